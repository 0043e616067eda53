"""Divisions of a step among the ranks of a case, as a plan counts them: by ``parallel.strategy``.

DeepSpeed's rules are written down (``rlhfbench.planning.zero``). Torch's ``fully_shard`` runs on fake tensors as it is,
with ranks that are not there, so that what it gathers and when is its own doing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from unittest import mock

from rlhfbench.measure.tally import Change
from rlhfbench.planning.zero import Engines, Zero
from rlhfkernels.config.case import Case
from rlhfkernels.errors import CaseError
from rlhfkernels.parallel.world import ALONE, World

if TYPE_CHECKING:
    from rlhfbench.planning.gathering import Tag
    from rlhfbench.planning.roles import Tell
    from rlhfkernels.parallel.strategies import Strategy
    from rlhfkernels.training.sizes import StepSizes
    from rlhfkernels.training.step import TrainingStep


class _Torchs(Zero):
    """A strategy of torch's own: all ranks hold as much."""

    __slots__ = ()

    def of_a_rank(self, case: Case) -> Case:
        """See ``Zero.of_a_rank``: the options of the case name this division."""
        return case

    def ranks(self, numels: Mapping[str, Sequence[int]]) -> list[int]:
        """See ``Zero.ranks``."""
        return [0]

    @contextmanager
    def stand_in(self, tag: Tag, tell: Tell, device: str) -> Iterator[Callable[..., Strategy] | None]:
        """See ``Zero.stand_in``."""
        yield None

    def changes(
        self,
        rank: int,
        stretches: Iterable[list[Change]],
        step: TrainingStep,
        sizes: StepSizes,
        numels: Mapping[str, Sequence[int]],
    ) -> Iterator[Change]:
        """See ``Zero.changes``."""
        return itertools.chain.from_iterable(stretches)


class Replicas(_Torchs):
    """Torch's ``DistributedDataParallel``: a rank holds everything, and its gradients live in buckets between steps."""

    __slots__ = ()

    @contextmanager
    def stand_in(self, tag: Tag, tell: Tell, device: str) -> Iterator[Callable[..., Strategy] | None]:
        """See ``Zero.stand_in``."""
        from rlhfbench.planning.replicas import PlannedReplicas

        yield PlannedReplicas


class Shards(_Torchs):
    """Torch's ``fully_shard``: the step that is planned is that of a rank."""

    __slots__ = ()

    @property
    def gathers_weights(self) -> bool:
        """See ``Zero.gathers_weights``: one rank gathers copies of its weights too."""
        return True

    def divides_from(self, stage: int) -> bool:
        """See ``Zero.divides_from``: weights, gradients and optimizer states are divided."""
        return True

    def repeats_layers(self, case: Case, sizes: StepSizes | None = None) -> bool:
        """See ``Zero.repeats_layers``."""
        return False

    @contextmanager
    def stand_in(self, tag: Tag, tell: Tell, device: str) -> Iterator[Callable[..., Strategy] | None]:
        """See ``Zero.stand_in``: torch's own, on one rank too."""
        from rlhfkernels.parallel.strategies import FullyShard

        yield FullyShard


_DIVISIONS: dict[str | None, type[Zero]] = {None: Zero, "ddp": Replicas, "fsdp": Shards, "deepspeed": Engines}


def division_of(case: Case) -> Zero:
    """The division that the options of ``case`` name."""
    parallel = case.options.parallel
    return _DIVISIONS[parallel.strategy](stage=parallel.zero_stage, world_size=parallel.world_size)


@contextmanager
def fake_ranks(division: Zero, device: str) -> Iterator[World]:
    """The world of ``division``, in which the other ranks are not there and collectives send nothing.

    It is the first rank's: tensors that do not divide evenly give it the most.

    Args:
        division: how the step is divided.
        device: of the case: gloo, which connects CPUs, copies what a reduce-scatter reads.

    Raises:
        CaseError: this process is a rank already.
    """
    if not division.gathers_weights:
        yield ALONE
        return
    from torch import distributed

    if distributed.is_initialized():
        raise CaseError(["weights that ranks divide are planned without a process group: plan before it is made."])
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend ``fake``

    size = division.world_size
    distributed.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    name = next(name for name in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(distributed, name))
    reduce_scatter = getattr(distributed, name)

    def copied(*arguments: Any, **more: Any) -> Any:
        copy = more["input"].clone()  # ProcessGroupGloo.cpp, ``reduce_scatter_tensor_coalesced``
        return reduce_scatter(*arguments, **more | {"input": copy})

    try:
        with mock.patch.object(distributed, name, copied) if device == "cpu" else nullcontext():
            yield World(0, size)
    finally:
        distributed.destroy_process_group()
