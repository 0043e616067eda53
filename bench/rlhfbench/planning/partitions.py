"""A rank's gradients, buckets and copies in DeepSpeed's stages 0 to 2, where a role has an engine of its own.

A step on fake tensors says what happens to each gradient; this says what a rank holds for it. It reads sizes alone, so
that a deep model is planned from a few of its layers: which weights lie in a rank's part, and at which of them a bucket
is full, depends on all layers. The rules are those of DeepSpeed 0.19, in zero/stage_1_and_2.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rlhfkernels.observer import PARTS

if TYPE_CHECKING:
    from rlhfbench.measure.tally import Change

# A change ``(GRADIENT, event, role, offset)`` of a recording. ``MADE``: a backward made a gradient; ``REDUCED``: it is
# put into the bucket; ``ENDED``: all are in it; ``STEPPED``: the optimizer of the role steps.
GRADIENT = "gradient"
MADE, REDUCED, ENDED, STEPPED = "made", "reduced", "ended", "stepped"

# A change like that of a growth: a gradient of that many bytes, which the step is about to free, counts in this part
# from then on.
STAYS = "stays"

_GRADIENTS, _BUCKETS = PARTS.index("gradients"), PARTS.index("buckets")
# Elements of gradients that stage 0 averages at a time (engine.py, ``MEMORY_OPT_ALLREDUCE_SIZE``).
_ALL_REDUCED = 500_000_000
_ALIGNMENT = 2  # elements: parts begin at multiples of it (``nccl_start_alignment_factor``)


class Part:
    """One rank's part of the weights of a role, which are cut into equal parts as one long row of elements.

    Args:
        numels: elements of the weights, in their order.
        world_size: ranks.
        rank: of them.

    Attributes:
        size: elements of every part; the last one is padded.
        pieces: elements of each piece of a weight in the part.
        touched: elements of the weights that lie in the part, each counted whole. DeepSpeed copies whole gradients, so
            that one across a boundary counts on both ranks.
    """

    def __init__(self, numels: Sequence[int], world_size: int, rank: int) -> None:
        self._numels, self._rank = numels, rank
        self._ends = list(itertools.accumulate(numels))
        self.size = part_size(numels, world_size)
        mine = [(i, n) for i in range(len(numels)) for owner, n in self.runs([i]) if owner == rank]
        self.pieces = [n for _, n in mine]
        self.touched = sum(numels[i] for i, _ in mine)

    def runs(self, weights: Iterable[int]) -> list[tuple[int, int]]:
        """(rank, elements) of the stretches of ``weights``, one after the other, that belong to one rank."""
        found: list[tuple[int, int]] = []
        for i in weights:
            start, end = self._ends[i] - self._numels[i], self._ends[i]
            while start < end:
                owner = start // self.size
                stop = min(end, (owner + 1) * self.size)
                before = found.pop()[1] if found and found[-1][0] == owner else 0
                found.append((owner, before + stop - start))
                start = stop
        return found

    def has(self, weight: int) -> bool:
        """True if some element of ``weight`` lies in the part."""
        return any(owner == self._rank for owner, _ in self.runs([weight]))


def part_size(numels: Sequence[int], world_size: int) -> int:
    """Elements of a rank's part."""
    return _ALIGNMENT * -(-sum(numels) // (_ALIGNMENT * world_size))


def fullest_rank(roles: Mapping[str, Sequence[int]], world_size: int) -> int:
    """The rank whose parts touch the most elements; of equal ranks the last, with whose weights a backward begins.

    Args:
        roles: of each role, the elements of its weights, in their order.
        world_size: ranks.
    """
    touched = [0] * world_size
    for numels in roles.values():
        size = part_size(numels, world_size)
        for n, end in zip(numels, itertools.accumulate(numels), strict=True):
            for rank in range((end - n) // size, -(-end // size)):
                touched[rank] += n
    return max(range(world_size), key=lambda rank: (touched[rank], rank))


class RoleChanges:
    """Bytes that a rank holds for the gradients of one role.

    Args:
        part: of the rank.
        numels: elements of the role's weights, in their order.
        item_size: bytes of an element.
        bucket_size: elements of a bucket.
        stage: 0 to 2.
    """

    def __init__(self, part: Part, numels: Sequence[int], *, item_size: int, bucket_size: int, stage: int) -> None:
        self._part, self._numels, self._item_size = part, numels, item_size
        self._bucket_size, self._stage = bucket_size, stage
        self._at = 0
        self._waiting: list[int] = []  # weights whose gradients are in the bucket
        self._filled = 0  # their elements
        self._beside = 0  # elements of reduced gradients that had no room in a bucket
        self._has_bucket = self._has_new = self._has_old = False  # of partitions: this backward's, earlier ones'

    def of(self, event: str, offset: int) -> Iterator[Change]:
        """The changes that follow from an event.

        Args:
            event: ``MADE``, ``REDUCED``, ``ENDED`` or ``STEPPED``.
            offset: of a gradient that is reduced: the place of its weight from that of the one before, in a circle.
        """
        if event == STEPPED:
            return self._step() if self._stage else self._step_replicas()
        if event == ENDED:
            return self._end()
        return self._make_bucket() if event == MADE else self._add(offset)

    def _grow(self, part: int, num_elements: int, item_size: int = 0) -> Change:
        return "grow", part, num_elements * (item_size or self._item_size), None

    def _for_a_moment(self, num_elements: int, item_size: int = 0) -> Iterator[Change]:
        yield self._grow(_BUCKETS, num_elements, item_size)
        yield self._grow(_BUCKETS, -num_elements, item_size)

    def _make_bucket(self) -> Iterator[Change]:
        """``setup_buckets``: whole, at the first gradient, however little is trained."""
        if self._stage and not self._has_bucket:
            self._has_bucket = True
            yield self._grow(_BUCKETS, self._bucket_size)

    def _add(self, offset: int) -> Iterator[Change]:
        """``reduce_independent_p_g_buckets_and_remove_grads``."""
        yield from self._make_bucket()
        self._at = (self._at + offset) % len(self._numels)
        size = self._numels[self._at]
        if self._filled + size > self._bucket_size:
            yield from self._reduce()
        self._waiting.append(self._at)
        self._filled += size
        if size > self._bucket_size:  # it stays where it is
            yield STAYS, _BUCKETS, size * self._item_size, None

    def _reduce(self) -> Iterator[Change]:
        """``reduce_ipg_grads``: what several ranks own is copied out of the bucket, and into it again."""
        for num_elements in self._copied():
            yield from self._for_a_moment(num_elements)
        is_mine = any(map(self._part.has, self._waiting))
        if is_mine and not self._has_new:
            self._has_new = True
            yield self._grow(_GRADIENTS, self._part.touched)
        if self._filled > self._bucket_size:  # by a single gradient, which stage 1 keeps where no copy replaces it
            if is_mine or self._stage == 2:
                yield self._grow(_BUCKETS, -self._filled)
            else:
                self._beside += self._filled
        self._waiting.clear()
        self._filled = 0

    def _copied(self) -> Iterator[int]:
        """Elements of each copy of the bucket (``allreduce_and_scatter``): a single stretch is sent as it lies."""
        sizes: list[int] = []
        runs = self._part.runs(self._waiting)
        for place, (_, size) in enumerate(runs, 1):
            sizes.append(size)
            if sum(sizes) > self._bucket_size or place == len(runs):
                if len(sizes) > 1:
                    yield sum(sizes)
                sizes.clear()

    def _end(self) -> Iterator[Change]:
        """``independent_gradient_partition_epilogue``: later backwards add to the partition of the first."""
        self._at = 0
        yield from self._reduce()
        if not self._has_new:  # gradients that no backward made are zeros
            yield self._grow(_GRADIENTS, self._part.touched)
        if self._has_old:
            yield self._grow(_GRADIENTS, -self._part.touched)
        self._has_new, self._has_old = False, True
        yield self._grow(_BUCKETS, -self._beside - self._has_bucket * self._bucket_size)
        self._has_bucket, self._beside = False, 0

    def _step(self) -> Iterator[Change]:
        """``get_grad_norm_direct`` takes one norm after the other in float64; ``step`` copies the partition."""
        part = self._part
        padding = part.size - sum(part.pieces)
        yield self._grow(_GRADIENTS, padding)
        yield from self._for_a_moment(max(part.pieces, default=0), 8)
        is_copied = len(part.pieces) + (padding > 0) > 1  # a single piece is used as it lies
        if is_copied:
            yield self._grow(_BUCKETS, part.size)
        if self._item_size < 4:
            yield self._grow(_BUCKETS, part.size, 4)
            if is_copied:
                yield self._grow(_BUCKETS, -part.size)
        yield self._grow(_GRADIENTS, -part.touched - padding)
        if self._item_size < 4:
            yield self._grow(_BUCKETS, -part.size, 4)
        elif is_copied:
            yield self._grow(_BUCKETS, -part.size)
        self._has_old = False

    def _step_replicas(self) -> Iterator[Change]:
        """Stage 0: gradients are averaged in flat copies, and widened all together (fp16/unfused_optimizer.py)."""
        size = 0
        for numel in self._numels:
            size += numel
            if size > _ALL_REDUCED:
                yield from self._for_a_moment(size)
                size = 0
        yield from self._for_a_moment(size)
        if self._item_size < 4:
            yield from self._for_a_moment(sum(self._numels), 4)


def changes_of_a_rank(changes: Iterable[Change], roles: Mapping[str, RoleChanges]) -> Iterator[Change]:
    """``changes`` with those of a rank's gradients in place of what was said of gradients."""
    staying: Change | None = None
    for change in changes:
        if change[0] != GRADIENT:
            yield change
            # Before the gradient is freed it would count twice: autograd holds it until the op that made it ends.
            if staying is not None and change[0] == "grow" and change[2] == -staying[2]:
                yield "grow", *staying[1:]
                staying = None
            continue
        _, event, role, offset = change
        for made in roles[role].of(event, offset):
            if staying is not None:
                yield "grow", *staying[1:]
                staying = None
            if made[0] == STAYS:
                staying = made
            else:
                yield made
    if staying is not None:
        yield "grow", *staying[1:]
