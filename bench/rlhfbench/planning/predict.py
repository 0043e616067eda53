"""Predicted memory: the engine, run on fake tensors under the ledger, without a device and without weights.

No second formula for memory exists that could drift from the code. Most decode steps of a long completion are skipped:
they have no larger tensor than the first and the last.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

from torch._subclasses.fake_tensor import FakeTensorMode

from rlhfbench.measure.ledger import MODEL_PARTS, Ledger, block_bytes
from rlhfbench.measure.measurements import (
    OUTER_VIEWS,
    Announcer,
    memory_object,
    persistent_model_bytes,
    run_under_ledger,
)
from rlhfbench.measure.timeline import Timeline
from rlhfbench.planning.devices import Accelerator
from rlhfbench.planning.zero import Zero
from rlhfbench.records.timelines import divided_timeline
from rlhfkernels.config.case import Case
from rlhfkernels.engine.engine import logprob_chunk_size
from rlhfkernels.observer import PARTS
from rlhfkernels.training.step import build_step
from rlhfkernels.training.work import Work, phase_work

_NO_VIEWS = dict.fromkeys(OUTER_VIEWS)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The prediction for a case.

    Attributes:
        case: the case.
        memory: the ``memory`` object of a record, on one rank.
        work: the least work of each phase.
        zero: the division among ranks.
        buckets: bytes of ZeRO's own buffers by phase; they are not part of ``memory``.
        timeline: the timeline of the step on one rank, if it was asked for; see ``Timeline.to_dict``. It lacks the
            decode steps that were skipped.
    """

    case: Case
    memory: dict[str, Any]
    work: dict[str, Work]
    zero: Zero
    buckets: dict[str, int]
    timeline: dict[str, Any] | None = None

    @property
    def total_bytes(self) -> int:
        """The step's highest total, with ZeRO's buckets."""
        return int(self.memory["total_bytes"]) + self.bucket_bytes

    @property
    def bucket_bytes(self) -> int:
        """ZeRO's buckets at that moment."""
        return self.buckets[self.memory["peak_phase"]]

    @property
    def persistent_model_bytes(self) -> int:
        """Weights, whole gradients and optimizer states on one rank; see ``measurements.persistent_model_bytes``."""
        return int(self.memory["persistent_model_bytes"])

    def floor_s_per_sample(self, gpu: Accelerator) -> float | None:
        """The shortest time a sample on ``gpu``, or ``None`` where its rates are not known for the dtype."""
        rate = gpu.flops_per_s.get(self.case.dtype)
        if rate is None or gpu.bytes_per_s is None:
            return None
        return sum(work.floor_s(rate, gpu.bytes_per_s) for work in self.work.values()) / self.case.batch_size


def plan_case(case: Case, zero: Zero | None = None, *, with_timeline: bool = False) -> Plan:
    """Runs one step of ``case`` on fake tensors.

    The step runs with CPU tensors: fake tensors of another device need that device's build of torch for their
    backward; storages are counted in the blocks of the device that was asked for.

    Args:
        case: what to plan. A stop token changes no shape and is left out. A data file stands for random rows with an
            attention mask, as short prompts have one. Triton is not run.
        zero: how the step is divided among ranks.
        with_timeline: keep the step's timeline too.

    Raises:
        ModelError: the model's configuration cannot be read, or it is too short.
        CaseError: an option does not fit the model.
    """
    # The C backend takes its memory from torch, so a plan counts it; Triton cannot start without the device.
    backend = case.options.engine.backend if case.device == "cpu" else "torch"
    options = case.options.replace({"rollout.stop_token_id": None, "engine.backend": backend})
    stand_in = dataclasses.replace(case, device="cpu", options=options)
    zero = zero or Zero()
    timeline = Timeline() if with_timeline else None
    ledger = Ledger("cpu", on_change=None if timeline is None else timeline.note, block_bytes=block_bytes(case.device))
    observer = Announcer(lambda _: None, ledger, timeline) if timeline else ledger
    # Transformers looks into position ids for packed sequences, and where it cannot look, it makes a mask that it would
    # not make of real ones. This engine packs nothing.
    unpacked = mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None)
    with unpacked, FakeTensorMode():
        step = build_step(stand_in, with_weights=False)
        step.engine.logprob_chunk = logprob_chunk_size(case, step.engine.vocab_size)  # of the device asked for
        run_under_ledger(step, ledger, observer)
        work, buckets = phase_work(step), zero.buckets(step)
    memory = _divided(memory_object(ledger, dict(_NO_VIEWS)), zero, buckets)
    kept = None if timeline is None else divided_timeline(timeline.to_dict(ledger.peaks), zero.divide)
    return Plan(case=case, memory=memory, work=work, zero=zero, buckets=buckets, timeline=kept)


def _divided(memory: dict[str, Any], zero: Zero, buckets: dict[str, int]) -> dict[str, Any]:
    """``memory`` on one rank: every phase's parts divided, and the peak found again, where the buckets stand too."""
    phases = {name: zero.divide(phase["parts"]) for name, phase in memory["phases"].items()}
    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    peak_phase = max(totals, key=lambda name: totals[name] + buckets[name])
    parts, total = phases[peak_phase], totals[peak_phase]
    assert set(parts) == set(PARTS)
    model = sum(parts[part] for part in MODEL_PARTS)
    return {
        **memory,
        "model_bytes": model,
        "activation_bytes": total - model - parts["rollout"],
        "rollout_bytes": parts["rollout"],
        "total_bytes": total,
        "persistent_model_bytes": persistent_model_bytes(phases.values()),
        "peak_phase": peak_phase,
        "parts": parts,
        "phases": {name: {"total_bytes": totals[name], "parts": phases[name]} for name in phases},
        "views": {**memory["views"], "ledger_peak_bytes": total},
    }


def plan_object(
    plan: Plan, gpu: Accelerator | None, max_batch_size: int | None, advice: str | None = None
) -> dict[str, Any]:
    """One entry of ``rlhfbench plan --json``.

    Args:
        plan: of the case.
        gpu: the device that was planned for, where one was named.
        max_batch_size: the largest batch that fits on it; 0 where not even one sequence does.
        advice: the sentence for a case of which not even one sequence fits.
    """
    return {
        "case": plan.case.to_dict(),
        "memory": plan.memory,
        "zero": {
            "stage": plan.zero.stage,
            "world_size": plan.zero.world_size,
            "global_batch_size": plan.case.batch_size * plan.zero.world_size,
            "bucket_bytes": plan.bucket_bytes,
            "phases": plan.buckets,
        },
        "fits": None if gpu is None else plan.total_bytes <= gpu.usable_bytes,
        "max_batch_size": max_batch_size,
        "advice": advice,
        "floor": {
            "gpu": None if gpu is None else gpu.name,
            "total_s_per_sample": None if gpu is None else plan.floor_s_per_sample(gpu),
            "phases": {name: {"flops": work.flops, "bytes": work.bytes} for name, work in plan.work.items()},
        },
    }
