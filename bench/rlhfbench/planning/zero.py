"""ZeRO by DeepSpeed's rules: how a plan runs the step of a rank, and what the rank holds beside the step's tensors.

The rules are those of DeepSpeed 0.19 with its default configuration (deepspeed/runtime/zero/config.py): contiguous
gradients, no offloading, and ``overlap_comm`` in stage 3 alone. ``allgather_bucket_size`` takes nothing: weights are
gathered in place (runtime/utils.py, all_gather_into_tensor_dp_groups).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rlhfbench.errors import SweepError
from rlhfbench.planning.partitions import Part, RoleChanges, changes_of_a_rank, fullest_rank
from rlhfkernels.config.case import Case

if TYPE_CHECKING:
    from rlhfbench.measure.tally import Change
    from rlhfbench.planning.gathering import Tag
    from rlhfbench.planning.roles import Tell
    from rlhfkernels.parallel.strategies import Strategy
    from rlhfkernels.training.sizes import StepSizes
    from rlhfkernels.training.step import TrainingStep


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Zero:
    """The division of a step by DeepSpeed's ZeRO; stage 0 of one rank is a process without DeepSpeed (see ``Engines``).

    The step runs on fake tensors with a stand-in for DeepSpeed: ``PlannedRoles`` in stages 0 to 2, which says what
    happens to gradients, ``PlannedStage3`` in stage 3, which gathers weights while the step runs.

    Attributes:
        stage: 0 to 3.
        world_size: ranks.

    Raises:
        SweepError: some field breaks its rule; every problem is named.
    """

    stage: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        problems = []
        if self.stage not in range(4):
            problems.append(f"zero-stage is {self.stage}: it must be 0, 1, 2 or 3.")
        if type(self.world_size) is not int or self.world_size < 1:
            problems.append(f"world-size is {self.world_size!r}: it must be an integer of at least 1.")
        if problems:
            raise SweepError(problems)

    @property
    def is_alone(self) -> bool:
        """True for one process without DeepSpeed."""
        return self.stage == 0 and self.world_size == 1

    def of_a_rank(self, case: Case) -> Case:
        """``case`` as a rank runs it: gradients add up in the dtype of the weights, and a trunk runs otherwise where
        these are divided.

        Raises:
            CaseError: DeepSpeed does not run with an option of the case.
        """
        if self.is_alone:
            return case
        named = {"strategy": "deepspeed", "zero_stage": self.stage, "world_size": self.world_size}
        options = case.options.replace({f"parallel.{name}": value for name, value in named.items()})
        return dataclasses.replace(case, options=options)

    @property
    def gathers_weights(self) -> bool:
        """True if a rank holds a part of each weight, so that its step runs among ranks that are not there."""
        return self.stage == 3

    def divides_from(self, stage: int) -> bool:
        """True if ranks divide what DeepSpeed divides from ``stage`` on."""
        return self.stage >= stage

    def repeats_layers(self, case: Case, sizes: StepSizes | None = None) -> bool:
        """True if one layer more repeats on a rank what the layer before it did.

        Args:
            case: the case.
            sizes: of the step; ``None`` asks whether that can be.
        """
        if self.stage < 3 or sizes is None:
            return True
        from rlhfbench.planning.stage3 import SUB_GROUP

        # Else buckets are full, and groups end, in the midst of a layer.
        return sizes.trained.count <= min(case.options.parallel.reduce_bucket_size, SUB_GROUP)

    @contextmanager
    def stand_in(self, tag: Tag, tell: Tell, device: str) -> Iterator[Callable[..., Strategy] | None]:
        """Makes the strategy of a step on fake tensors; ``None`` where it is the case's own.

        Args:
            tag: is told which tensors are gathered.
            tell: is told what happens to gradients.
            device: of the case.
        """
        if self.is_alone:
            yield None
        elif self.stage < 3:
            from rlhfbench.planning.roles import PlannedRoles

            yield functools.partial(PlannedRoles, stage=self.stage, num_ranks=self.world_size, tell=tell)
        else:
            from rlhfbench.planning.gathering import deepspeed_linear
            from rlhfbench.planning.stage3 import PlannedStage3

            with deepspeed_linear():
                yield functools.partial(PlannedStage3, tag=tag, is_gloo=device == "cpu")

    def ranks(self, numels: Mapping[str, Sequence[int]]) -> list[int]:
        """The ranks of which one holds most.

        It is the rank whose parts touch the most weights, or one that makes its part of the gradients before the
        others: the first in the optimizer's step, the last in a backward.

        Args:
            numels: of the step, as ``trained_numels``.
        """
        if self.is_alone or self.gathers_weights:
            return [0]
        return sorted({0, fullest_rank(numels, self.world_size), self.world_size - 1})

    def changes(
        self,
        rank: int,
        stretches: Iterable[list[Change]],
        step: TrainingStep,
        sizes: StepSizes,
        numels: Mapping[str, Sequence[int]],
    ) -> Iterator[Change]:
        """The changes of a rank's ledger, from those of the step that was run.

        Args:
            rank: one of ``ranks``.
            stretches: the changes of the step.
            step: the step.
            sizes: of the step.
            numels: of the step, as ``trained_numels``.
        """
        roles = {
            role: RoleChanges(
                Part(each, self.world_size, rank),
                each,
                item_size=sizes.trained_item,
                bucket_size=step.case.options.parallel.reduce_bucket_size,
                stage=self.stage,
            )
            for role, each in numels.items()
        }
        return changes_of_a_rank(itertools.chain.from_iterable(stretches), roles)


class Engines(Zero):
    """DeepSpeed's division as the options of a case name it: its engines run on one rank too."""

    __slots__ = ()

    @property
    def is_alone(self) -> bool:
        """See ``Zero.is_alone``."""
        return False


def trained_numels(step: TrainingStep) -> dict[str, tuple[int, ...]]:
    """Elements of the weights of each role with an optimizer, in their order."""
    from rlhfkernels.parallel.strategies import by_storage  # it imports torch

    return {
        role: tuple(p.numel() for p in by_storage(step.engine.parameters_of_role[role])) for role in step.optimizers
    }


def cases_of_a_rank(cases: Iterable[Case], world_size: int | None = None) -> tuple[Case, ...]:
    """``cases`` whose batch sizes are over all ranks, as one rank runs them.

    Args:
        cases: the cases.
        world_size: ranks of every case; ``None`` is what the options of each name.

    Raises:
        SweepError: ranks do not divide a batch; every such batch size is named.
        CaseError: a rank's batch does not divide into its micro-batches.
    """
    pairs = [(case, world_size or case.options.parallel.world_size) for case in cases]
    wrong = dict.fromkeys((case.batch_size, size) for case, size in pairs if case.batch_size % size)
    if wrong:
        raise SweepError(
            f"batch_sizes has {batch_size}: with --global-batch it must be a multiple of world-size {size}."
            for batch_size, size in wrong
        )
    return tuple(dataclasses.replace(case, batch_size=case.batch_size // size) for case, size in pairs)
