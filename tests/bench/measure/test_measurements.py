import gc
import json

import pytest
import torch

from rlhfbench.measure import MeasureSettings, measure_case
from rlhfbench.measure import measurements as passes
from rlhfbench.measure.ledger import Ledger
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options
from rlhfkernels.errors import NumericalError
from rlhfkernels.methods.table import METHODS, Phase
from rlhfkernels.observer import PARTS, Observer
from rlhfkernels.training.step import build_step
from rlhfkernels.training.work import Work

PHASES = (Phase(name="think", kind="inference"), Phase(name="learn", kind="update"), Phase(name="step", kind="update"))
SETTINGS = MeasureSettings(time_budget_s=0.0)


class FakeStats:
    def __init__(self, finite):
        self.finite = finite

    def check_finite(self):
        if not self.finite:
            raise NumericalError("kl is nan: the step's numbers must be finite.")


class FakeStep:
    """A small step that keeps the contract: a weight, a rollout, a cache, two stretches of one phase."""

    phases = PHASES

    def __init__(self, fails_in_run=None, finite=True):
        self.weight = torch.nn.Parameter(torch.ones(8, 8))
        self.moment = torch.zeros(8, 8)
        self.fails_in_run, self.finite = fails_in_run, finite
        self.observers = []

    def run(self, observer):
        self.observers.append(observer)
        with observer.phase("think"), torch.no_grad():
            rollout = torch.ones(4, 8)
            observer.tag("rollout", [rollout])
            cache = torch.ones(2, 8)
            observer.tag("kv_cache", [cache])
            del cache
        for _ in range(2):
            with observer.phase("learn"):
                if len(self.observers) == self.fails_in_run:
                    raise torch.OutOfMemoryError("no room")
                (rollout @ self.weight).exp().mean().backward()
        with observer.phase("step"), torch.no_grad():
            self.moment.add_(self.weight.grad)
            self.weight.sub_(self.moment, alpha=1e-3)
            self.weight.grad = None
        return FakeStats(self.finite)

    def persistent_tensors(self):
        return [("base", self.weight), ("optimizer", self.moment)]

    def trained_parameters(self):
        return [self.weight]

    engine_taken = "fast"
    kernels_taken = "torch"

    def prompt_summary(self):
        return {"source": "random", "num_prompts": None, "num_truncated": 0}


@pytest.fixture
def fake(monkeypatch):
    """Lets ``measure_case`` find a fake step; returns what puts one there."""

    def put(step):
        monkeypatch.setattr(passes, "build_step", lambda case: step)
        monkeypatch.setattr(passes, "phase_work", lambda step: {phase.name: Work(2000, 50) for phase in PHASES})
        return step

    monkeypatch.setattr(passes, "measure_ceilings", lambda device, dtype: pytest.fail("the ceilings were given"))
    return put


CEILINGS = {"matmul_flops_per_s": 1000.0, "copy_bytes_per_s": 10.0}
CASE = Case(method="full", model="tiny", prompt_len=4, completion_len=4, batch_size=4)


def settings(**fields):
    return MeasureSettings(**{"time_budget_s": 0.0, "ceilings": CEILINGS, **fields})


def test_the_passes_in_their_order(fake, tmp_path):
    step, told = fake(FakeStep()), []
    result = measure_case(CASE, settings(profile_dir=str(tmp_path)), told.append)
    phases = [f"phase:{phase.name}" for phase in PHASES]
    assert told == ["build", "warm-up", *phases, "timing", "memory", *phases, "profile", *phases, "ceilings"]
    assert json.loads(json.dumps(result)) == result
    assert set(result) == {"memory", "latency", "work", "prompts", "engine", "kernels", "ceilings", "timeline"}
    assert result["prompts"] == step.prompt_summary()
    assert result["ceilings"] == CEILINGS
    assert result["timeline"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{CASE.id}-{phase.name}.json.gz" for phase in PHASES
    )
    assert gc.isenabled()


def test_the_timeline_has_the_peak_of_the_record(fake):
    fake(FakeStep())
    result = json.loads(json.dumps(measure_case(CASE, settings(timeline=True), lambda text: None)))
    memory, timeline = result["memory"], result["timeline"]
    peak = timeline["peak"]
    assert (peak["phase"], peak["total_bytes"]) == (memory["peak_phase"], memory["total_bytes"])
    at = timeline["events"].index(peak["event"])
    assert {part: sizes[at] for part, sizes in timeline["parts_bytes"].items()} == memory["parts"]
    assert [row["names"] for row in timeline["phases"]] == [["think"], ["learn"], ["learn"], ["step"]]


def test_the_clock_sees_no_instrument(fake):
    """A timed step runs under the clock alone; before it the warm-up, after it the ledger's."""
    step = fake(FakeStep())
    measure_case(CASE, settings(timeline=True), lambda text: None)
    assert [type(observer).__name__ for observer in step.observers] == ["Announcer", "StepClock", "Announcer"]


def test_memory_by_hand(fake):
    fake(FakeStep())
    memory = measure_case(CASE, settings(), lambda text: None)["memory"]
    weight, rows = 8 * 8 * 4, 4 * 8 * 4
    assert memory["phases"]["think"] == {
        "total_bytes": 2 * weight + rows + 64,
        "parts": {**dict.fromkeys(PARTS, 0), "base": weight, "optimizer": weight, "rollout": rows, "kv_cache": 64},
    }
    assert memory["peak_phase"] == "learn"
    assert memory["parts"] == memory["phases"]["learn"]["parts"]
    assert memory["rollout_bytes"] == rows
    assert memory["model_bytes"] + memory["activation_bytes"] + memory["rollout_bytes"] == memory["total_bytes"]
    assert sum(memory["parts"].values()) == memory["total_bytes"]
    views = memory["views"]
    assert views["ledger_peak_bytes"] == memory["total_bytes"]
    assert views["host_peak_bytes"] > 2**20
    absent = ("allocator_peak", "allocator_reserved", "allocator_rest", "workspace", "driver_peak")
    assert {views[f"{name}_bytes"] for name in absent} == {None}
    assert set(memory["largest_tensor"]) == {"bytes", "shape", "op"}


def test_latency_adds_up():
    steps_s = [{"think": 1.0, "learn": 4.0}, {"think": 3.0, "learn": 2.0}, {"think": 2.0, "learn": 9.0}]
    latency = passes.latency_object(PHASES, steps_s, 4, "budget")
    assert latency == {
        "inference_s_per_sample": 0.5,
        "update_s_per_sample": 1.0,
        "total_s_per_sample": 1.5,
        "phases": {
            "think": {"median_s": 2.0, "samples_s": [1.0, 3.0, 2.0]},
            "learn": {"median_s": 4.0, "samples_s": [4.0, 2.0, 9.0]},
            "step": {"median_s": 0.0, "samples_s": [0.0, 0.0, 0.0]},
        },
        "stopped_because": "budget",
    }


@pytest.mark.parametrize(("kind", "absent"), [("inference", "update"), ("update", "inference")])
def test_latency_of_a_kind_without_a_phase_is_null(kind, absent):
    phases = [phase for phase in PHASES if phase.kind == kind]
    latency = passes.latency_object(phases, [{phase.name: 1.0 for phase in phases}], 4, "budget")
    assert latency[f"{absent}_s_per_sample"] is None
    assert latency["total_s_per_sample"] == latency[f"{kind}_s_per_sample"] == len(phases) / 4


def test_the_floor_is_the_slower_of_the_two_ceilings():
    latency = {"phases": {"think": {"median_s": 10.0}, "learn": {"median_s": 30.0}}}
    work = passes.work_object({"think": Work(2000, 50), "learn": Work(1000, 10)}, CEILINGS, latency)
    assert work == {
        "phases": {
            "think": {"flops": 2000, "bytes": 50, "floor_s": 5.0},
            "learn": {"flops": 1000, "bytes": 10, "floor_s": 1.0},
        },
        "floor_fraction": 6.0 / 40.0,
    }


@pytest.mark.parametrize("run", [1, 2, 3])  # the warm-up, the timed step, the memory pass
def test_a_step_that_fails_names_its_phase_last(fake, run):
    fake(FakeStep(fails_in_run=run))
    told = []
    with pytest.raises(torch.OutOfMemoryError):
        measure_case(CASE, settings(), told.append)
    assert told[-1] == "phase:learn"
    assert gc.isenabled()


def test_numbers_that_are_not_finite_are_an_error(fake):
    fake(FakeStep(finite=False))
    with pytest.raises(NumericalError):
        measure_case(CASE, settings(), lambda text: None)


def test_threads_are_set(fake):
    fake(FakeStep())
    threads = torch.get_num_threads()
    try:
        measure_case(CASE, settings(num_threads=threads + 1), lambda text: None)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


# The real step.

FRUGAL = {"gradient_checkpointing": True, "kv_cache": "growing", "micro_batch_size": 1}
TINY = {"model": "tiny", "prompt_len": 4, "completion_len": 4, "batch_size": 2, "lora_rank": 2}


def walk():
    """Every live storage that a tensor known to the garbage collector looks into: {address: bytes}."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in storages}


class Walked(Observer):
    """Compares a ledger with an independent walk whenever a phase ends."""

    def __init__(self, ledger, before):
        self.ledger, self.before, self.num_walks = ledger, before, 0

    def enter_phase(self, name):
        self.ledger.enter_phase(name)

    def exit_phase(self, name):
        self.ledger.exit_phase(name)
        found, live = walk(), self.ledger.live_storages()
        assert live == {key: size for key, size in found.items() if key not in self.before or key in live}
        assert sum(live.values()) == self.ledger.total_bytes == sum(self.ledger.parts.values())
        self.num_walks += 1

    def tag(self, part, tensors):
        self.ledger.tag(part, tensors)


@pytest.mark.parametrize("options", [{}, FRUGAL])
@pytest.mark.parametrize("method", METHODS)
def test_a_real_step_under_the_ledger(method, options):
    step = build_step(Case(method=method, **TINY, options=Options.of(options)))
    storages = [tensor.untyped_storage() for _, tensor in step.persistent_tensors()]
    persistent = {storage._cdata: storage.nbytes() for storage in storages}  # each once
    before = walk()
    with Ledger() as ledger:
        for part, tensor in step.persistent_tensors():
            ledger.tag(part, (tensor,))
        ledger.watch_gradients(step.trained_parameters())
        watched = Walked(ledger, before)
        step.run(watched)
    assert watched.num_walks == len(step.phases)
    assert list(ledger.peaks) == [phase.name for phase in step.phases]
    trained = sum(parameter.numel() * 4 for parameter in step.trained_parameters())
    for snapshot in ledger.peaks.values():
        assert sum(snapshot.parts.values()) == snapshot.total_bytes
        weights = sum(snapshot.parts[part] for part in ("base", "adapters", "heads", "optimizer"))
        assert weights == sum(persistent.values())
    assert ledger.peaks["generate"].parts["kv_cache"] > 0
    assert ledger.peaks["generate"].parts["activations"] == ledger.peaks["score"].parts["activations"] == 0
    assert ledger.peaks["optimize"].parts["gradients"] == trained


def test_a_real_case():
    result = measure_case(Case(method="hydra", **TINY), MeasureSettings(time_budget_s=0.0), lambda text: None)
    assert json.loads(json.dumps(result)) == result
    assert result["latency"]["stopped_because"] == "budget"
    assert 0 < result["work"]["floor_fraction"] < 1


def test_what_the_allocator_handed_out_beyond_ledger_and_workspaces_is_the_rest(fake):
    ledger = Ledger("cpu")
    passes.watched_step(FakeStep(), ledger, ledger)
    views = dict.fromkeys(passes.OUTER_VIEWS)
    total = passes.memory_object(ledger, views)["total_bytes"]
    views |= {"allocator_peak_bytes": total + 100, "workspace_bytes": 30}
    assert passes.memory_object(ledger, views)["views"]["allocator_rest_bytes"] == 70
