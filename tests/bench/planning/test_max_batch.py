from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfbench.planning import predict as planning
from rlhfbench.planning.max_batch import BatchSearch, plan_kinds, with_batch
from rlhfbench.planning.predict import plan_case
from rlhfbench.planning.zero import Zero
from rlhfkernels import Case

CASE = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=1)


@dataclasses.dataclass(frozen=True)
class FakePlan:
    case: Case
    total_bytes: int


def test_the_largest_batch_fits_and_the_next_does_not(make_case: Callable[..., Case]) -> None:
    case = make_case("hydra", batch_size=1)
    limit = plan_case(dataclasses.replace(case, batch_size=11)).total_bytes + 10
    assert BatchSearch(limit, Zero()).largest(case) == 11
    assert BatchSearch(10, Zero()).largest(case) == 0


def search(
    monkeypatch: pytest.MonkeyPatch, total: Callable[[int], int], usable_bytes: int, *noted: int
) -> tuple[int, list[int]]:
    """(the largest batch, the batches planned for it) where a step of b sequences takes ``total(b)`` bytes."""
    planned: list[int] = []

    def plan(case: Case, zero: Zero) -> FakePlan:
        planned.append(case.batch_size)
        return FakePlan(case, total(case.batch_size))

    monkeypatch.setattr(planning, "plan_case", plan)
    one = BatchSearch(usable_bytes, Zero())
    for batch_size in noted:
        one.note(FakePlan(with_batch(CASE, batch_size), total(batch_size)))  # type: ignore[arg-type]
    return one.largest(CASE), planned


def test_on_a_straight_line_the_answer_and_the_next_batch_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    # 10 + 3 b of 72: 20 takes 70, and 21 takes 73.
    assert search(monkeypatch, lambda b: 1000 + 300 * b, 7200, 1, 4) == (20, [20, 21])


def test_memory_that_stops_growing_hides_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the logits of a chunk do: the line through 1 and 4 puts 5 far over the device."""
    assert search(monkeypatch, lambda b: 100 * min(b, 4) + 10 * b, 455, 1, 4)[0] == 5


def test_a_bend_far_from_the_answer_costs_few_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    largest, planned = search(monkeypatch, lambda b: max(100_000 + b, 300 * b), 150_000)
    assert largest == 500
    assert len(planned) < 8


@given(
    fixed=st.integers(0, 5000), slopes=st.tuples(st.integers(1, 50), st.integers(1, 500)), usable=st.integers(1, 10**5)
)
def test_the_answer_is_right_for_the_highest_of_two_phases(fixed: int, slopes: tuple[int, int], usable: int) -> None:
    def total(b: int) -> int:
        return max(fixed + slopes[0] * b, slopes[1] * b) + 50 * min(b, 7)

    right = next((b for b in range(512, 0, -1) if total(b) <= usable), 0)
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert search(monkeypatch, total, usable)[0] == right
        assert search(monkeypatch, total, usable, 1, 4)[0] == right


def test_kinds_are_planned_apart_and_come_back_in_order(make_case: Callable[..., Case]) -> None:
    cases = [make_case(method, batch_size=b) for b in (1, 2) for method in ("hydra", "joined-hydra")]
    planned = plan_kinds(cases, Zero())
    assert [item.plan.case for item in planned] == cases
    assert [item.plan.total_bytes for item in planned] == [plan_case(case).total_bytes for case in cases]
    assert {(item.max_batch_size, item.of_one) for item in planned} == {(None, None)}
    room = planned[2].plan.total_bytes + 1
    (one, two) = plan_kinds(cases[::2], Zero(), usable_bytes=room)
    assert one.max_batch_size == two.max_batch_size == 2
    (nothing,) = plan_kinds(cases[:1], Zero(), usable_bytes=1)
    assert (nothing.max_batch_size, nothing.of_one) == (0, nothing.plan)
