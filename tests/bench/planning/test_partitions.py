"""The gradients of a rank in ZeRO's stages 0 to 2, change by change, against sizes computed by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest

from rlhfbench.planning.partitions import (
    ENDED,
    MADE,
    REDUCED,
    STEPPED,
    Part,
    RoleChanges,
    changes_of_a_rank,
    fullest_rank,
)
from rlhfkernels.observer import PARTS

NUMELS = (5, 4, 3)
BACKWARD = [(REDUCED, -1), (REDUCED, -1), (REDUCED, -1), (ENDED, 0)]


def role(rank: int = 0, *, bucket: int = 8, stage: int = 2, item: int = 4, world: int = 2) -> RoleChanges:
    return RoleChanges(Part(NUMELS, world, rank), NUMELS, item_size=item, bucket_size=bucket, stage=stage)


def totals(changes: RoleChanges, events: Iterable[tuple[str, int]]) -> list[int]:
    """The live bytes after each change that changed them."""
    sizes = [change[2] for event, offset in events for change in changes.of(event, offset)]
    return list(itertools.accumulate(size for size in sizes if size))


def test_a_part_may_begin_and_end_inside_a_weight() -> None:
    first, last = Part(NUMELS, 2, 0), Part(NUMELS, 2, 1)
    assert (first.size, first.pieces, first.touched) == (6, [5, 1], 9)
    assert (last.size, last.pieces, last.touched) == (6, [3, 3], 7)
    assert [first.has(i) for i in range(3)] == [True, True, False]
    # Neighbours of one rank are sent together, in the order in which they lie in the bucket.
    assert first.runs([0, 1]) == [(0, 6), (1, 3)]
    assert first.runs([2, 1]) == [(1, 3), (0, 1), (1, 3)]


def test_parts_are_equal_and_begin_at_even_elements() -> None:
    parts = [Part((5, 2), 3, rank) for rank in range(3)]
    assert [(part.size, part.pieces) for part in parts] == [(4, [4]), (4, [1, 2]), (4, [])]


def test_the_fullest_rank_touches_the_most_elements() -> None:
    assert fullest_rank({"actor": NUMELS}, 2) == 0
    assert fullest_rank({"actor": (4, 2, 6)}, 2) == 1  # of equals the last
    assert fullest_rank({"actor": (4, 2, 6), "critic": (1, 9)}, 2) == 0


def test_stage_2_holds_a_bucket_in_the_backward_and_its_partition_from_the_first_reduction() -> None:
    changes = role()
    # The third gradient finds no room: 7 elements of two ranks are copied, then all of what the part touches is made.
    assert totals(changes, BACKWARD) == [32, 60, 32, 68, 36]
    # A norm in float64 of the largest piece; the partition is copied before the gradients go.
    assert totals(changes, [(STEPPED, 0)]) == [40, 0, 24, -12, -36]


def test_the_other_rank_makes_its_partition_when_a_gradient_of_its_own_is_reduced() -> None:
    assert totals(role(bucket=3), BACKWARD[:2]) == [12, 28]  # the first reduction holds nothing of rank 0
    assert totals(role(1, bucket=3), BACKWARD[:2]) == [12, 40, 56]


def test_a_later_backward_adds_to_the_partition_of_the_first() -> None:
    changes = role(bucket=100)
    assert totals(changes, BACKWARD) == [400, 448, 400, 436, 36]
    assert totals(changes, BACKWARD) == [400, 448, 400, 436, 400, 0]


def test_a_gradient_larger_than_the_bucket_stays_where_it_is_until_it_is_reduced() -> None:
    # The gradient of 5 elements belongs to one rank, and is sent as it lies; the 4 before belong to two.
    assert totals(role(bucket=4), BACKWARD) == [16, 32, 16, 52, 72, 52, 36]


def test_gradients_that_no_backward_made_are_zeros() -> None:
    assert totals(role(1), [(REDUCED, 0), (ENDED, 0)]) == [32, 60, 28]


def test_stage_1_keeps_its_bucket_until_the_step_and_reduces_there() -> None:
    changes = role(stage=1)
    assert totals(changes, [(MADE, 0)] * 3) == [32]
    reduced = [(REDUCED, 0), (REDUCED, 1), (REDUCED, 1), (ENDED, 0)]
    # In the order of the weights: 5 elements of one rank, then 7 of two.
    assert totals(changes, reduced) == [36, 64, 36, 4]
    assert totals(role(1, stage=1), [(MADE, 0), *reduced]) == [32, 60, 32, 60, 28]


def test_stage_1_keeps_a_large_gradient_of_another_rank() -> None:
    steps = [(REDUCED, 0), (REDUCED, 1), (REDUCED, 1), (ENDED, 0)]
    mine, others = totals(role(bucket=4, stage=1), steps), totals(role(1, bucket=4, stage=1), steps)
    assert mine[:4] == [16, 36, 72, 52]
    assert others[:4] == [16, 36, 52, 36]


def test_the_step_widens_gradients_of_bfloat16() -> None:
    changes = role(item=2)
    totals(changes, BACKWARD)
    assert totals(changes, [(STEPPED, 0)]) == [40, 0, 12, 36, 24, 6, -18]


def test_a_single_piece_is_used_as_it_lies() -> None:
    part = Part((4, 8), 2, 1)
    changes = RoleChanges(part, (4, 8), item_size=4, bucket_size=20, stage=2)
    totals(changes, [(REDUCED, 1), (REDUCED, 1), (ENDED, 0)])
    assert totals(changes, [(STEPPED, 0)]) == [48, 0, -32]


def test_the_last_rank_pads_its_part() -> None:
    changes = role(2, world=3, bucket=20)
    assert Part(NUMELS, 3, 2).size == 4
    totals(changes, BACKWARD)
    assert totals(changes, [(STEPPED, 0)])[-1] == -4 * Part(NUMELS, 3, 2).touched


@pytest.mark.parametrize(("item", "found"), [(4, [48, 0]), (2, [24, 0, 48, 0])])
def test_stage_0_averages_a_flat_copy(item: int, found: list[int]) -> None:
    assert totals(role(stage=0, item=item), [(MADE, 0), (STEPPED, 0)]) == found


def test_what_is_no_gradient_stays() -> None:
    others = [("enter_phase", "update"), ("grow", PARTS.index("base"), 3, None)]
    changes = [others[0], ("gradient", MADE, "actor", 0), others[1]]
    found = list(changes_of_a_rank(changes, {"actor": role(stage=1)}))
    assert found == [others[0], ("grow", PARTS.index("buckets"), 32, None), others[1]]


def test_a_gradient_that_stays_counts_once_while_autograd_still_holds_it() -> None:
    temporary, buckets = PARTS.index("temporary"), PARTS.index("buckets")
    freed = ("grow", temporary, -16, None)  # the gradient of 4 elements
    later = ("grow", temporary, 8, None)
    changes = [("gradient", REDUCED, "actor", -1), ("gradient", REDUCED, "actor", -1), freed, later]
    found = list(changes_of_a_rank(changes, {"actor": role(bucket=3)}))
    assert found[-3:] == [freed, ("grow", buckets, 16, None), later]


def test_a_gradient_that_is_not_freed_counts_when_the_next_one_is_reduced() -> None:
    buckets = PARTS.index("buckets")
    reduced = [("gradient", REDUCED, "actor", -1)] * 3
    for num in (2, 3):
        changes = changes_of_a_rank(reduced[:num], {"actor": role(bucket=3)})
        found = [change[1:3] for change in changes if change[1] == buckets]
        assert found[:2] == [(buckets, 12), (buckets, 16)], num
