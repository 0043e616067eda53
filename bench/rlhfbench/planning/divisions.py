"""How the ranks of a case divide a step, as a plan counts it: by ``parallel.strategy``.

DeepSpeed's rules are written down (``rlhfbench.planning.zero``). Torch's ``fully_shard`` runs on fake tensors as it is,
with ranks that are not there, so that what it gathers and when is its own doing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rlhfbench.planning.zero import Zero
from rlhfkernels.config.case import Case
from rlhfkernels.parallel.world import ALONE, World

if TYPE_CHECKING:
    from rlhfkernels.training.sizes import StepSizes
    from rlhfkernels.training.step import TrainingStep


class Replicas(Zero):
    """Torch's ``DistributedDataParallel``: a rank holds everything, and its gradients live in buckets between steps."""

    __slots__ = ()

    def divide(self, parts: dict[str, int], sizes: StepSizes | None = None) -> dict[str, int]:
        """See ``Zero.divide``."""
        return parts if sizes is None else {**parts, "gradients": sizes.trained.num_bytes}

    def buckets(self, step: TrainingStep, sizes: StepSizes | None = None) -> dict[str, int]:
        """See ``Zero.buckets``: the gradients are the buckets."""
        return dict.fromkeys((phase.name for phase in step.phases), 0)


class Shards(Replicas):
    """Torch's ``fully_shard``: the step that is planned is that of a rank, so nothing is left to divide."""

    __slots__ = ()

    def divide(self, parts: dict[str, int], sizes: StepSizes | None = None) -> dict[str, int]:
        """See ``Zero.divide``."""
        return parts


_DIVISIONS: dict[str | None, type[Zero]] = {None: Zero, "ddp": Replicas, "fsdp": Shards, "deepspeed": Zero}
# Strategies that run on fake tensors as they are.
_ON_FAKE_RANKS = ("fsdp",)


def division_of(case: Case) -> Zero:
    """The division that the options of ``case`` name."""
    parallel = case.options.parallel
    return _DIVISIONS[parallel.strategy](stage=parallel.zero_stage, world_size=parallel.world_size)


def runs_on_fake_ranks(case: Case) -> bool:
    """True if the step of a rank of ``case`` is planned with the strategy's own code."""
    return case.options.parallel.strategy in _ON_FAKE_RANKS and case.options.parallel.world_size > 1


@contextmanager
def fake_ranks(case: Case) -> Iterator[World]:
    """The world of ``case``, in which the other ranks are not there and collectives send nothing.

    It is the first rank's: tensors that do not divide evenly give it the most.
    """
    if not runs_on_fake_ranks(case):
        yield ALONE
        return
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend ``fake``

    size = case.options.parallel.world_size
    distributed.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield World(0, size)
    finally:
        distributed.destroy_process_group()
