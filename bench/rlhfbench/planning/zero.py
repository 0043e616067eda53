"""ZeRO by DeepSpeed's rules: what each stage divides among ranks, and the buffers it holds beside a step's tensors.

The rules are those of DeepSpeed 0.19 with its default configuration (deepspeed/runtime/zero/config.py): contiguous
gradients, no offloading, and ``overlap_comm`` in stage 3 alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rlhfbench.errors import SweepError
from rlhfbench.planning.partitions import RoleGradients, role_gradients
from rlhfkernels.config.case import Case
from rlhfkernels.methods.program import Optimize
from rlhfkernels.observer import PARTS

if TYPE_CHECKING:
    from rlhfbench.measure.tally import Change
    from rlhfbench.planning.gathering import Tag
    from rlhfkernels.parallel.strategies import Strategy
    from rlhfkernels.training.sizes import StepSizes
    from rlhfkernels.training.step import TrainingStep

# What each stage divides among the ranks. Stage 3 divides all of it, and a plan runs it as a rank does.
# ``allgather_bucket_size`` takes nothing: the weights are gathered in place (runtime/utils.py,
# all_gather_into_tensor_dp_groups).
_DIVIDES: dict[int, tuple[str, ...]] = {0: (), 1: ("optimizer",), 2: ("optimizer",), 3: ()}
_GRADIENTS = PARTS.index("gradients")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Zero:
    """The division of a step by DeepSpeed's ZeRO.

    Stages 0 to 2 divide what one process holds. Stage 3 gathers weights while a step runs, so its step is run as a
    rank runs it, with ``PlannedStage3``.

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
        if self.stage not in _DIVIDES:
            problems.append(f"zero-stage is {self.stage}: it must be 0, 1, 2 or 3.")
        if self.world_size < 1:
            problems.append(f"world-size is {self.world_size}: it must be a whole number of at least 1.")
        if problems:
            raise SweepError(problems)

    def of_a_rank(self, case: Case) -> Case:
        """``case`` as a rank runs it: in stages 1 to 3 gradients add up in the dtype of the weights.

        Raises:
            CaseError: stage 3 does not run with an option of the case.
        """
        if self.stage == 0 or case.options.parallel.strategy is not None:
            return case
        if self.runs_as_it_is:  # a trunk runs otherwise where its weights are divided
            named = {"strategy": "deepspeed", "zero_stage": self.stage, "world_size": self.world_size}
            options = case.options.replace({f"parallel.{name}": value for name, value in named.items()})
            return dataclasses.replace(case, options=options)
        added_in = case.options.optimizer.grad_accum_dtype or case.dtype
        options = case.options.replace({"optimizer.grad_accum_dtype": added_in})
        return dataclasses.replace(case, options=options)

    @property
    def runs_as_it_is(self) -> bool:
        """True if the step that is planned is that of a rank, so that nothing is left to divide."""
        return self.stage == 3

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
    def stand_in(self, tag: Tag, device: str) -> Iterator[Callable[..., Strategy] | None]:
        """Makes the strategy of a step on fake tensors; ``None`` where it is the case's own.

        Args:
            tag: is told which tensors are gathered.
            device: of the case.
        """
        if self.stage < 3:
            yield None
            return
        from rlhfbench.planning.gathering import deepspeed_linear
        from rlhfbench.planning.stage3 import PlannedStage3

        with deepspeed_linear():
            yield functools.partial(PlannedStage3, tag=tag, is_gloo=device == "cpu")

    def changes(
        self,
        stretches: Iterable[list[Change]],
        step: TrainingStep,
        sizes: StepSizes,
        numels: Mapping[str, Sequence[int]],
    ) -> Iterator[Change]:
        """The changes of a rank's ledger, from those of the step that was run.

        Args:
            stretches: the changes of the step.
            step: the step.
            sizes: of the step.
            numels: of the step, as ``trained_numels``.
        """
        changes = itertools.chain.from_iterable(stretches)
        return changes if self.stage != 2 else self._with_partitions(changes, step, sizes, numels)

    def _with_partitions(
        self, changes: Iterable[Change], step: TrainingStep, sizes: StepSizes, numels: Mapping[str, Sequence[int]]
    ) -> Iterator[Change]:
        """The changes of a rank in stage 2, which holds its partition of the gradients and lets go of the others.

        A gradient is whole until it is in the bucket, which is reduced when it has no room for the next one, and at the
        end of the backward. A rank makes its partition whole when the first gradient of it is reduced
        (zero/stage_1_and_2.py, copy_grads_in_partition): of all ranks the last, since backwards begin at the last
        weights.
        """
        updates = [phase for phase in step.phases if phase.kind == "update"]
        trained = {phase.name: {role for p in phase.passes for role in p.roles} & numels.keys() for phase in updates}
        bucket = step.case.options.parallel.reduce_bucket_size * sizes.trained_item
        whole = held = before = made = waiting = partition = 0

        def now() -> Iterator[Change]:
            """Yields what the rank holds more, or less, than at the change before."""
            nonlocal held
            kept = min(whole, before + (partition if made > waiting else 0))
            yield "grow", _GRADIENTS, kept - held
            held = kept

        for change in changes:
            if change[0] == "enter_phase":
                before, made, waiting = held, 0, 0
                shares = (-(-sum(numels[role]) // self.world_size) for role in trained.get(change[1], ()))
                partition = sum(shares) * sizes.trained_item
            elif change[0] == "exit_phase":
                waiting = 0
                yield from now()
            is_move = change[0] == "move" and change[3] == _GRADIENTS
            if not is_move and (change[0] != "grow" or change[1] != _GRADIENTS):
                yield change
                continue
            num_bytes, storage = (change[1], change[4:]) if is_move else (change[2], change[3:])
            whole += num_bytes
            if num_bytes > 0:
                made += num_bytes
                waiting = num_bytes if waiting + num_bytes > bucket else waiting + num_bytes
            if is_move:
                yield "grow", change[2], -num_bytes, *storage
            elif num_bytes > 0:
                yield "grow", _GRADIENTS, num_bytes, *storage
                yield "grow", _GRADIENTS, -num_bytes, *storage
            yield from now()

    def divide(self, parts: dict[str, int], sizes: StepSizes | None = None) -> dict[str, int]:
        """The bytes of each part on one rank; what does not divide evenly is rounded up.

        DeepSpeed holds more than one process in stages 1 and 2: a master copy of float32 weights too
        (``single_partition_of_fp32_groups``).

        Args:
            parts: the bytes of each part on one process.
            sizes: of the step; ``None`` adds nothing.
        """
        parts = dict(parts)
        if sizes is not None and 0 < self.stage < 3 and sizes.trained_item == 4:
            parts["optimizer"] += sizes.trained.num_bytes
        divided = _DIVIDES[self.stage]
        return {part: -(-size // self.world_size) if part in divided else size for part, size in parts.items()}

    def buckets(
        self, step: TrainingStep, sizes: StepSizes | None = None, numels: Mapping[str, Sequence[int]] | None = None
    ) -> dict[str, int]:
        """The bytes of DeepSpeed's own buffers on one rank, by phase; every phase of ``step`` is there.

        Stages 1 and 2 fill one reduce bucket per backward: it is made whole when the backward begins, however little is
        trained (zero/stage_1_and_2.py, setup_buckets and _release_ipg_buffers). Stage 2 drops it at the backward's end,
        stage 1 in the optimizer's step.

        The optimizer's step flattens gradients beside those that are there: all of a role in stage 0, a partition in
        stages 1 and 2.

        Args:
            step: the step.
            sizes: of the same step at another depth; ``None`` takes its own.
            numels: of that step, as ``trained_numels``; ``None`` takes its own.
        """
        none = dict.fromkeys((phase.name for phase in step.phases), 0)
        if self.runs_as_it_is or (self.world_size == 1 and self.stage == 0):
            return none
        if sizes is None:
            from rlhfkernels.training.sizes import StepSizes

            sizes = StepSizes.of(step)
        bucket = step.case.options.parallel.reduce_bucket_size * sizes.trained_item  # of the trained weights' dtype
        ranks = role_gradients(numels or trained_numels(step), sizes.trained_item, self.world_size)
        return none | _most([_update_buffers(self.stage, step, roles, bucket) for roles in ranks])


def trained_numels(step: TrainingStep) -> dict[str, tuple[int, ...]]:
    """Elements of the weights of each role with an optimizer, in their order."""
    from rlhfkernels.parallel.strategies import by_storage  # it imports torch

    return {
        role: tuple(p.numel() for p in by_storage(step.engine.parameters_of_role[role])) for role in step.optimizers
    }


def _most(ranks: Sequence[dict[str, int]]) -> dict[str, int]:
    """The bytes of each phase on the rank that holds most."""
    return {phase: max(rank[phase] for rank in ranks) for phase in ranks[0]}


def _update_buffers(stage: int, step: TrainingStep, roles: Sequence[RoleGradients], bucket: int) -> dict[str, int]:
    """The bytes of the update phases in stages 0 to 2, beside the gradients that the plan counts."""
    found: dict[str, int] = {}
    held = 0  # by the roles whose backwards have run
    for phase in step.phases:
        trained = {role for p in phase.passes for role in p.roles} if phase.kind == "update" else set()
        mine = [role for role in roles if role.role in trained]
        if stage and mine:
            found[phase.name] = held + len(mine) * bucket
            held += sum(bucket if stage == 1 else role.tensors - role.partition for role in mine)
        if any(isinstance(stage_, Optimize) for stage_ in phase.stages):
            found[phase.name] = found.get(phase.name, 0) + _optimizer_buffers(stage, roles, bucket)
    return found


def _optimizer_buffers(stage: int, roles: Sequence[RoleGradients], bucket: int) -> int:
    """The most that the optimizers' steps hold beside all gradients; what earlier steps freed counts against it."""
    highest = freed = 0
    for i, role in enumerate(roles):
        waiting = roles[i:]
        if stage == 0:
            highest = max(highest, role.whole - freed)
            freed += role.whole
        elif stage == 1:
            highest = max(highest, role.tensors + len(waiting) * bucket - freed)
            freed += role.whole
        else:
            copies = sum(each.tensors - each.partition for each in waiting)
            highest = max(highest, max(role.partition, role.norm) + copies - freed)
            freed += role.partition
    return highest


def cases_of_a_rank(cases: Iterable[Case], world_size: int) -> tuple[Case, ...]:
    """``cases`` whose batch sizes are over all ranks, as one rank runs them.

    Raises:
        SweepError: ranks do not divide a batch; every such batch size is named.
        CaseError: a rank's batch does not divide into its micro-batches.
    """
    cases = tuple(cases)
    wrong = dict.fromkeys(case.batch_size for case in cases if case.batch_size % world_size)
    if wrong:
        raise SweepError(
            f"batch_sizes has {size}: with --global-batch it must be a multiple of world-size {world_size}."
            for size in wrong
        )
    return tuple(dataclasses.replace(case, batch_size=case.batch_size // world_size) for case in cases)
