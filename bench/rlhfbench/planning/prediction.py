"""The plan of a case: what is predicted of it. Importing this does not import torch: plans travel between processes."""

from __future__ import annotations

import dataclasses
from typing import Any

from rlhfbench.planning.devices import Accelerator
from rlhfbench.planning.zero import Zero
from rlhfkernels.config.case import Case
from rlhfkernels.training.roofline import Work


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The prediction for a case.

    Attributes:
        case: the case.
        memory: the ``memory`` object of a record, on one rank.
        work: the least work of each phase.
        zero: the division among ranks.
        timeline: the timeline of the step on one rank, if it was asked for; see ``Timeline.to_dict``. It lacks the
            decode steps that were skipped.
    """

    case: Case
    memory: dict[str, Any]
    work: dict[str, Work]
    zero: Zero
    timeline: dict[str, Any] | None = None

    @property
    def total_bytes(self) -> int:
        """The step's highest total."""
        return int(self.memory["total_bytes"])

    @property
    def persistent_model_bytes(self) -> int:
        """Weights, whole gradients and optimizer states on one rank; see ``memory.persistent_model_bytes``."""
        return int(self.memory["persistent_model_bytes"])

    @property
    def global_batch_size(self) -> int:
        """Data rows of a step over all ranks."""
        return self.case.batch_size * self.zero.world_size

    def floor_s_per_sample(self, gpu: Accelerator) -> float | None:
        """The shortest time a sample on ``gpu``, or ``None`` where its rates are not known for the dtype.

        The work is that of a rank, and the ranks' rows are those of one step, as in a record's seconds per sample.
        """
        rate = gpu.flops_per_s.get(self.case.dtype)
        if rate is None or gpu.bytes_per_s is None:
            return None
        steps = [phase.name for phase in self.case.role_table.phases if phase.kind != "prepare"]
        return sum(self.work[name].floor_s(rate, gpu.bytes_per_s) for name in steps) / self.global_batch_size


def plan_object(
    plan: Plan, gpu: Accelerator | None, max_batch_size: int | None, advice: str | None = None
) -> dict[str, Any]:
    """One entry of ``rlhfbench plan --json``.

    Args:
        plan: of the case.
        gpu: the device that was planned for, where one was named.
        max_batch_size: the largest batch that fits on it, in data rows, up to ``max_batch.MAX_BATCH_SIZE``; 0 where not
            even one row does.
        advice: the sentence for a case of which not even one data row fits.
    """
    return {
        "case": plan.case.to_dict(),
        "memory": plan.memory,
        "zero": {
            "stage": plan.zero.stage,
            "world_size": plan.zero.world_size,
            "global_batch_size": plan.global_batch_size,
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
