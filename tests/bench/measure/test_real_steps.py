"""Measurements of real steps of a tiny model."""

import gc
import json

import pytest
import torch

from rlhfbench.measure import MeasurementOptions, measure_case, measurements
from rlhfbench.measure.ledger import Ledger
from rlhfbench.measure.memory import OUTER_VIEWS, measure_memory, memory_object
from rlhfbench.planning.predict import plan_case
from rlhfbench.records.file import make_record
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options
from rlhfkernels.engine.engine import Engine
from rlhfkernels.methods.table import METHODS
from rlhfkernels.observer import Observer
from rlhfkernels.parallel.world import World
from rlhfkernels.training.step import build_step

FRUGAL = {
    "engine.gradient_checkpointing": True,
    "engine.cache_implementation": "dynamic",
    "engine.micro_batch_size": 1,
}


TINY = {"model": "tiny", "prompt_len": 4, "completion_len": 4, "batch_size": 2}


def walk():
    """Returns bytes by address of every live storage, found through the garbage collector's tensors."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in storages}


class Walked(Observer):
    """Compares a ledger with an independent walk at the end of every phase."""

    def __init__(self, ledger, before):
        self.ledger, self.before, self.walked = ledger, before, []

    def enter_phase(self, name):
        self.ledger.enter_phase(name)

    def exit_phase(self, name):
        self.ledger.exit_phase(name)
        found, live = walk(), {key: entry.num_bytes for key, entry in self.ledger._storages.entries.items()}
        assert live == {key: size for key, size in found.items() if key not in self.before or key in live}
        assert sum(live.values()) == self.ledger.total_bytes == sum(self.ledger.parts.values())
        self.walked.append(name)

    def tag(self, part, tensors):
        self.ledger.tag(part, tensors)


@pytest.mark.parametrize("options", [{}, FRUGAL])
@pytest.mark.parametrize("method", METHODS)
def test_a_real_step_under_the_ledger(method, options):
    step = build_step(Case(method=method, **TINY, options=Options.of({"lora.r": 2, **options})))
    storages = [tensor.untyped_storage() for _, tensor in step.persistent_tensors()]
    persistent = {storage._cdata: storage.nbytes() for storage in storages}  # each once
    before = walk()
    with Ledger("cpu") as ledger:
        for part, tensor in step.persistent_tensors():
            ledger.tag(part, (tensor,))
        ledger.track_gradients(step.trained_parameters())
        watched = Walked(ledger, before)
        step.run(watched)
    names = [phase.name for phase in step.phases]
    assert list(dict.fromkeys(watched.walked)) == list(ledger.peaks) == names
    trained = sum(parameter.numel() * 4 for parameter in step.trained_parameters())
    for snapshot in ledger.peaks.values():
        assert sum(snapshot.parts.values()) == snapshot.total_bytes
        weights = sum(snapshot.parts[part] for part in ("base", "adapters", "heads", "optimizer"))
        assert weights == sum(persistent.values())
    assert {name for name in names if ledger.peaks[name].parts["kv_cache"]} == {"generate"} & set(names)
    for phase in step.phases:
        assert phase.kind == "update" or ledger.peaks[phase.name].parts["activations"] == 0
    if trained:
        assert ledger.peaks["optimize"].parts["gradients"] == trained


def test_a_real_case():
    result = measure_case(Case(method="hydra", **TINY), MeasurementOptions(time_budget_s=0.0), lambda text: None)
    assert json.loads(json.dumps(result)) == result
    assert result["block"]["stopped_because"] == "budget"
    assert abs(result["stats"]["kl"]) < 1e-5  # the policy is still the reference
    assert set(result["block"]["floors_s"]) == set(result["work"]["phases"]) == set(result["block"]["phases"])


@pytest.mark.parametrize(("method", "num_bases"), [("dpo", 2), ("dpo-lora", 1)])
def test_a_prepared_case(method, num_bases):
    case = Case(method=method, **TINY, options=Options.of({"dpo.precompute_ref_log_probs": True}))
    notices = []
    result = measure_case(case, MeasurementOptions(time_budget_s=0.0, timeline=True), notices.append)
    block, memory, work = result["block"], result["memory"], result["work"]
    assert block["prepare_s_per_sample"] > 0
    assert list(block["phases"]) == list(result["latency"]["phases"]) == ["update", "optimize"]
    assert set(memory["phases"]) == set(work["phases"]) == set(block["floors_s"]) == {"prepare", "update", "optimize"}
    assert memory["phases"] == plan_case(case).memory["phases"]
    bases = {name: phase["parts"]["base"] for name, phase in memory["phases"].items()}
    assert bases["prepare"] == num_bases * bases["update"]
    record = make_record(
        case, outcome="ok", error=None, measured=result, started_at="2026-01-01T00:00:00+00:00", wall_s=1.0
    )
    latency = record["latency"]
    assert latency["prepare_s_per_sample"] == block["prepare_s_per_sample"]
    assert latency["inference_s_per_sample"] is None
    assert latency["total_s_per_sample"] == latency["update_s_per_sample"]
    floors = [phase["floor_s"] for name, phase in record["work"]["phases"].items() if name != "prepare"]
    measured = sum(phase["mean_s"] for phase in latency["phases"].values())
    assert record["work"]["floor_fraction"] == pytest.approx(sum(floors) / measured)
    assert result["stats"]["reference_error"] < 1e-5
    assert {name for phase in result["timeline"]["phases"] for name in phase["names"]} == {"update", "optimize"}
    assert notices.index("phase:prepare") < notices.index("warm-up")


@pytest.mark.parametrize(("with_file", "num_rows"), [(False, 4 * 2), (True, 3)])
def test_preparing_takes_as_long_as_its_slowest_rank_for_the_rows_of_all(tmp_path, monkeypatch, with_file, num_rows):
    options = {"dpo.precompute_ref_log_probs": True}
    if with_file:  # each rank reads all rows
        path = tmp_path / "pairs.jsonl"
        path.write_text((json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n") * 3)
        options["data.pairs"] = str(path)
    step = build_step(Case(method="dpo-lora", **TINY, options=Options.of(options)))
    step.world = World(rank=1, size=4)
    monkeypatch.setattr(World, "gather", lambda world, own_s: [0.0, own_s, own_s + 1000.0, 0.0])
    prepared = measurements.prepare_step(step, "cpu", lambda text: None)
    assert prepared.data_set_s > 1000.0
    assert prepared.data_set_s / prepared.s_per_sample == pytest.approx(num_rows)


def test_a_reference_model_is_gone_without_garbage_collection():
    """Garbage is not collected within a measurement."""
    step = build_step(Case(method="dpo", **TINY, options=Options.of({"dpo.precompute_ref_log_probs": True})))
    with measurements._manual_gc(), Ledger("cpu") as ledger:
        for part, tensor in step.persistent_tensors():
            ledger.tag(part, (tensor,))
        before = ledger.parts
        step.prepare(ledger)
        after = ledger.parts
    assert (after["base"], after["heads"]) == (before["base"] / 2, before["heads"] / 2)


def test_the_check_of_loaded_models_changes_no_memory_figure(monkeypatch):
    case = Case(method="lora", model="tiny", prompt_len=4, completion_len=4, batch_size=2)

    def memory():
        ledger = measure_memory(build_step(case), "cpu", lambda text: None)
        return memory_object(ledger, dict.fromkeys(OUTER_VIEWS))

    checked = memory()
    monkeypatch.setattr(Engine, "_check_models", lambda engine: None)
    assert memory() == checked
