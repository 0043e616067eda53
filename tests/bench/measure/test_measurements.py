import dataclasses
import gc
import json
import random
import re
import tempfile
from pathlib import Path

import psutil
import pytest
import torch

from rlhfbench.measure import MeasurementOptions, host, measure_case, measurements
from rlhfbench.measure.stopping import StoppingRule
from rlhfbench.measure.turns import run_in_turns
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options
from rlhfkernels.errors import ModelError, NumericalError
from rlhfkernels.methods.phases import Phase
from rlhfkernels.observer import PARTS, Observer
from rlhfkernels.training.roofline import Work

PHASES = (Phase(name="think", kind="inference"), Phase(name="learn", kind="update"), Phase(name="step", kind="update"))


class FakeStats:
    def __init__(self, finite, num_runs, more):
        self.finite, self.num_runs, self.more = finite, num_runs, more

    def check_finite(self):
        if not self.finite:
            raise NumericalError("kl is nan: the step's numbers must be finite.")

    def to_dict(self):
        return {"num_runs": self.num_runs, "kl": None, **self.more}


class FakeStep:
    """A small step with a weight, a rollout, a cache and two stretches of one phase."""

    phases = PHASES

    def __init__(self, fails_in_run=None, finite=True):
        self.weight = torch.nn.Parameter(torch.ones(8, 8))
        self.moment = torch.zeros(8, 8)
        self.fails_in_run, self.finite = fails_in_run, finite
        self.observers = []
        self.first_stats = {}

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
        return FakeStats(self.finite, len(self.observers), self.first_stats)

    def persistent_tensors(self):
        return [("base", self.weight), ("optimizer", self.moment)]

    def trained_parameters(self):
        return [self.weight]

    trunk_used = "fast"
    attention_used = "sdpa"
    backend_used = "torch"

    def rewind(self):
        pass

    def data_summary(self):
        return {"source": "random", "num_prompts": None, "num_truncated": 0}


@pytest.fixture
def fake(monkeypatch):
    """Returns a function that makes ``measure_case`` build a given fake step."""

    def put(step):
        monkeypatch.setattr(measurements, "build_step", lambda case, world: step)
        monkeypatch.setattr(measurements, "phase_work", lambda step: {phase.name: Work(2000, 50) for phase in PHASES})
        return step

    monkeypatch.setattr(measurements, "measure_ceilings", lambda device, dtype: CEILINGS)
    return put


CEILINGS = {"matmul_flops_per_s": 1000.0, "copy_bytes_per_s": 10.0, "read_bytes_per_s": 20.0}


CASE = Case(method="full", model="tiny", prompt_len=4, completion_len=4, batch_size=4)


def options(**fields):
    return MeasurementOptions(**{"time_budget_s": 0.0, **fields})


def test_a_step_that_enters_no_phase_is_refused(fake):
    step = fake(FakeStep())
    step.run = lambda observer: FakeStats(True, 1, {})
    sentence = "the step entered no phase: run(observer) must enter its phases: think, learn, step."
    with pytest.raises(ModelError, match=re.escape(sentence)):
        measure_case(CASE, options(), lambda stage: None)


def test_memory_is_that_of_the_first_rows_however_many_steps_were_timed(tmp_path, monkeypatch):
    """Packed rows differ in size."""
    path = tmp_path / "demonstrations.jsonl"
    rows = [{"prompt": "a" * size, "completion": "b" * size} for size in (1, 1, 2, 3, 5, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    packed = Options.of({"sft.packing": True, "data.demonstrations": str(path)})
    case = dataclasses.replace(CASE, method="sft-lora", prompt_len=6, completion_len=6, batch_size=2, options=packed)
    found, timed = [], measurements.time_steps
    for num_more in (0, 1):

        def time_steps(step, *rest, num_more=num_more, **named):
            for _ in range(num_more):
                step.run(Observer())
            return timed(step, *rest, **named)

        monkeypatch.setattr(measurements, "time_steps", time_steps)
        found.append(measure_case(case, options(), lambda stage: None)["memory"])
    assert found[0]["phases"] == found[1]["phases"]
    assert found[0]["parts"] == found[1]["parts"]


def test_a_phase_that_a_step_does_not_declare_is_refused(fake):
    """Its time would be in no total."""
    step = fake(FakeStep())
    step.phases = PHASES[1:]
    with pytest.raises(ModelError, match=f"entered phase '{PHASES[0].name}', which is none of its phases"):
        measure_case(CASE, options(), lambda name: None)


def test_the_measurements_in_their_order(fake, tmp_path):
    step, notices = fake(FakeStep()), []
    result = measure_case(CASE, options(profile_dir=str(tmp_path)), notices.append)
    phases = [f"phase:{phase.name}" for phase in PHASES]
    assert notices == [
        "ceilings",
        "build",
        "warm-up",
        *phases,
        "timing",
        "memory",
        *phases,
        "profile",
        *phases,
        *phases,
    ]
    assert json.loads(json.dumps(result)) == result
    objects = {
        "memory",
        "latency",
        "work",
        "stats",
        "prompts",
        "engine",
        "attention",
        "kernels",
        "fast_paths",
        "num_threads",
        "block",
        "timeline",
    }
    assert set(result) == objects
    assert result["num_threads"] == torch.get_num_threads()
    assert result["fast_paths"] == ""  # on a CPU
    assert result["prompts"] == step.data_summary()
    assert result["timeline"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["profile.json", *(f"{CASE.id}-{phase.name}.json.gz" for phase in PHASES)]
    )
    assert gc.isenabled()


def test_the_timeline_has_the_peak_of_the_record(fake):
    fake(FakeStep())
    result = json.loads(json.dumps(measure_case(CASE, options(timeline=True), lambda text: None)))
    memory, timeline = result["memory"], result["timeline"]
    peak = timeline["peak"]
    assert (peak["phase"], peak["total_bytes"]) == (memory["peak_phase"], memory["total_bytes"])
    at = timeline["events"].index(peak["event"])
    assert {part: sizes[at] for part, sizes in timeline["parts_bytes"].items()} == memory["parts"]
    assert [row["names"] for row in timeline["phases"]] == [["think"], ["learn"], ["learn"], ["step"]]


def test_a_timed_step_has_no_instrument_but_the_clock(fake):
    """The observers of the warm-up, the timed step and the memory measurement."""
    step = fake(FakeStep())
    measure_case(CASE, options(timeline=True), lambda text: None)
    assert [type(observer).__name__ for observer in step.observers] == ["Announcer", "StepClock", "Announcer"]


def test_memory_by_hand(fake):
    fake(FakeStep())
    memory = measure_case(CASE, options(), lambda text: None)["memory"]
    weight, rows = 8 * 8 * 4, 4 * 8 * 4
    assert memory["phases"]["think"] == {
        "total_bytes": 2 * weight + rows + 64,
        "parts": {**dict.fromkeys(PARTS, 0), "base": weight, "optimizer": weight, "rollout": rows, "kv_cache": 64},
    }
    assert memory["persistent_model_bytes"] == 3 * weight  # the weight, its gradient, its moment
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


def test_the_resident_peak_includes_what_was_taken_before_the_timed_steps(fake):
    before = host.peak_resident_bytes()
    taken = b"x" * (before - psutil.Process().memory_info().rss + 64 * 2**20)
    del taken
    fake(FakeStep())
    views = measure_case(CASE, options(), lambda text: None)["memory"]["views"]
    assert views["host_peak_bytes"] >= before + 48 * 2**20  # less what was given back meanwhile


def test_the_first_block_has_every_step_by_phase_and_the_record_its_kinds(fake):
    fake(FakeStep())
    result = measure_case(CASE, options(), lambda text: None)
    block = result["block"]
    assert set(block) == {
        "started_at", "build_s", "prepare_s_per_sample", "phases", "stopped_because", "in_turns", "interference",
        "ceilings", "floors_s", "error",
    }  # fmt: skip
    assert {name: len(samples) for name, samples in block["phases"].items()} == {"think": 1, "learn": 1, "step": 1}
    assert block["stopped_because"] == "budget"
    assert block["ceilings"] == CEILINGS
    assert block["floors_s"] == dict.fromkeys(("think", "learn", "step"), 2.5)  # 50 bytes, all of them read
    assert 0 <= block["interference"]["other_cpu_share"] <= 1
    assert result["latency"] == {
        "phases": {"think": {"kind": "inference"}, "learn": {"kind": "update"}, "step": {"kind": "update"}},
        "num_blocks": 4,
    }
    assert result["work"]["phases"]["think"] == {"flops": 2000, "bytes": 50, "written_bytes": 0}


def test_in_turns_the_referee_says_how_many_steps_are_timed(fake):
    """Ceilings would be measured beside the other side, so there are none."""
    fake(FakeStep())
    results = []
    with tempfile.TemporaryDirectory() as folder:
        jobs = [lambda path: results.append(measure_case(CASE, options(block=1, turns=path), lambda text: None))] * 2
        run_in_turns(jobs, Path(folder), 0.0, random.Random(0), aborts=[pytest.fail])
    for block in (result["block"] for result in results):
        assert block["in_turns"]
        assert block["ceilings"] is block["floors_s"] is None
        assert len(block["phases"]["think"]) == 5
        assert block["stopped_because"] == "budget"


def test_without_any_turn_one_step_is_timed(fake, tmp_path):
    fake(FakeStep())
    block = measure_case(CASE, options(block=1, turns=str(tmp_path / "nobody")), lambda text: None)["block"]
    assert len(block["phases"]["think"]) == 1


def test_a_later_block_is_timed_and_nothing_else(fake, tmp_path):
    step, notices = fake(FakeStep()), []
    result = measure_case(CASE, options(block=2, timeline=True, profile_dir=str(tmp_path)), notices.append)
    assert set(result) == {"block"}
    assert [type(observer).__name__ for observer in step.observers] == ["Announcer", "StepClock"]
    assert "memory" not in notices
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("build_s", "asked", "num_blocks"), [(10.0, None, 4), (10.1, None, 1), (10.1, 3, 3), (1.0, 1, 1)]
)
def test_a_model_that_is_slow_to_build_has_one_block_unless_told(fake, monkeypatch, build_s, asked, num_blocks):
    fake(FakeStep())
    budgets = []

    def time_steps(step, case, rule, notify, turns, **ranks):
        budgets.append(rule.budget_s)
        monkeypatch.undo()
        fake(step)
        return original(step, case, dataclasses.replace(rule, budget_s=0.0), notify, turns)

    original = measurements.time_steps
    readings = iter([0.0, build_s])
    monkeypatch.setattr(measurements, "time_steps", time_steps)
    monkeypatch.setattr(measurements.time, "perf_counter", lambda: next(readings))
    result = measure_case(CASE, options(time_budget_s=6.0, num_blocks=asked), lambda text: None)
    assert result["latency"]["num_blocks"] == num_blocks
    assert budgets == [6.0 / num_blocks]  # the blocks share the budget


@pytest.mark.parametrize("run", [1, 2, 3])  # warm-up, timed step, memory measurement
def test_a_failed_step_announces_its_phase_last(fake, run):
    fake(FakeStep(fails_in_run=run))
    notices = []
    with pytest.raises(torch.OutOfMemoryError):
        measure_case(CASE, options(), notices.append)
    assert notices[-1] == "phase:learn"
    assert gc.isenabled()


def test_a_step_that_is_not_finite_is_an_error(fake):
    fake(FakeStep(finite=False))
    with pytest.raises(NumericalError):
        measure_case(CASE, options(), lambda text: None)


def test_stats_are_those_of_the_first_warm_up_step(fake, monkeypatch):
    step = fake(FakeStep())
    monkeypatch.setattr(StoppingRule, "is_warm", lambda self, steps_s: len(steps_s) == 3)
    result = measure_case(CASE, options(), lambda text: None)
    assert len(step.observers) > 3
    assert result["stats"] == {"num_runs": 1, "kl": None}


def test_threads_are_set(fake):
    fake(FakeStep())
    threads = torch.get_num_threads()
    try:
        measure_case(CASE, options(num_threads=threads + 1), lambda text: None)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_a_case_whose_decoding_is_wrong_is_not_timed(fake):
    step = fake(FakeStep())
    step.first_stats = {"ratio_error": 0.5}
    with pytest.raises(ModelError, match="decoding and the full forward disagree"):
        measure_case(CASE, options(), lambda text: None)
    assert len(step.observers) == 1


def test_a_step_on_a_gpu_whose_case_is_on_the_cpu_is_refused(fake, monkeypatch):
    """Nothing would wait for the GPU, and its memory would not count."""
    fake(FakeStep())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    used = {0: 0, 1: 0}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", used.get)
    assert measure_case(CASE, options(), lambda stage: None)["block"]["phases"]
    used[1] = 1024
    with pytest.raises(ModelError, match=r"^the step uses CUDA, and the device of its case is cpu: name it with"):
        measure_case(CASE, options(), lambda stage: None)
