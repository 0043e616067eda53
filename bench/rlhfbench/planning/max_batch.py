"""The largest batch that a plan says fits: a search over plans, with the kinds of case planned in parallel.

Cases that differ in their batch size alone are of one kind.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rlhfbench.processes import map_parallel
from rlhfkernels.config.case import Case

if TYPE_CHECKING:
    from rlhfbench.planning.prediction import Plan
    from rlhfbench.planning.zero import Zero

# The search stops here: the time of a plan grows with the number of log-probability chunks.
MAX_BATCH_SIZE = 512
_PRELOAD = ("rlhfbench.planning.preload",)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """The plan of a case, and the largest batch of its kind.

    Attributes:
        plan: the plan.
        max_batch_size: the largest batch that fits on the device, in data rows, up to ``MAX_BATCH_SIZE``; 0 if not even
            one row fits; ``None`` if no device was named.
        of_one: the plan of one data row, if not even that fits.
    """

    plan: Plan
    max_batch_size: int | None = None
    of_one: Plan | None = None


def plan_kinds(
    cases: Sequence[Case],
    zero: Zero | None,
    *,
    usable_bytes: int | None = None,
    with_timeline: bool = False,
    meanwhile: Callable[[], object] = lambda: None,
) -> list[Planned]:
    """Plans ``cases`` and finds the largest batch of each kind, one kind per process.

    Args:
        cases: the cases to plan.
        zero: the division among ranks; ``None`` is what each case names.
        usable_bytes: memory that a step may take; ``None`` searches for no largest batch.
        with_timeline: keep the timeline of each step.
        meanwhile: see ``map_parallel``.

    Raises:
        ModelError, CaseError: as for ``plan_case``.
        ForkServerError: a worker process died.
    """
    kinds: dict[Case, list[Case]] = {}
    for case in cases:
        kinds.setdefault(with_batch(case, 1), []).append(case)
    one = functools.partial(_plan_kind, zero=zero, usable_bytes=usable_bytes, with_timeline=with_timeline)
    # Longest first: the last process to finish then has a short kind.
    longest_first = sorted(kinds.values(), key=_num_ops, reverse=True)
    planned = map_parallel(one, longest_first, preload=_PRELOAD, meanwhile=meanwhile)
    by_case = {item.plan.case: item for kind in planned for item in kind}
    return [by_case[case] for case in cases]


def _num_ops(cases: list[Case]) -> int:
    """Relative planning time of a kind: a forward pass with an adapter has about three times the ops."""
    method = cases[0].role_table
    passes = (*method.score_passes, *method.update_passes)
    return len(cases) * sum(1 if p.weights.adapter is None else 3 for p in passes)


def _plan_kind(cases: list[Case], *, zero: Zero | None, usable_bytes: int | None, with_timeline: bool) -> list[Planned]:
    from rlhfbench.planning.predict import plan_case

    plans = [plan_case(case, zero, with_timeline=with_timeline) for case in cases]
    if usable_bytes is None:
        return [Planned(plan=plan) for plan in plans]
    search = BatchSearch(usable_bytes, zero)
    for plan in plans:
        search.note(plan)
    largest = search.largest(cases[0])
    of_one = None if largest else search.of_one(cases[0])
    return [Planned(plan=plan, max_batch_size=largest, of_one=of_one) for plan in plans]


class BatchSearch:
    """Searches for the largest batch that fits with few plans: totals are nearly affine in the batch.

    The batch above the answer is planned too. A line through two smaller ones proves nothing of it: some memory stops
    growing (the logits of a chunk), and some begins at a number of rows.

    Args:
        usable_bytes: memory that a step may take.
        zero: the division among ranks.
        limit: the largest batch that is tried, in data rows.
    """

    def __init__(self, usable_bytes: int, zero: Zero | None, limit: int = MAX_BATCH_SIZE) -> None:
        self._usable_bytes, self._zero, self._limit = usable_bytes, zero, limit
        self._plans: dict[Case, dict[int, Plan]] = {}

    def note(self, plan: Plan) -> None:
        """Keeps a plan that exists already, if the search could ask for it."""
        if plan.case == with_batch(plan.case, plan.case.batch_size):
            self._of(plan.case)[plan.case.batch_size] = plan

    def of_one(self, case: Case) -> Plan:
        """The plan of one data row of ``case``'s kind."""
        return self._plan(case, 1)

    def largest(self, case: Case) -> int:
        """The largest batch of ``case``'s kind that fits, up to the limit; 0 if not even one row fits.

        Each batch is tried as one micro-batch in one mini-batch.
        """
        low: int = 0
        high: int | None = None
        guess = min(case.batch_size, self._limit)
        while high is None or high - low > 1:
            if self._plan(case, guess).total_bytes <= self._usable_bytes:
                low = guess
                if low == self._limit:
                    break
            else:
                high = guess
            guess = self._next_guess(case, low, high)
        return low

    def _next_guess(self, case: Case, low: int, high: int | None) -> int:
        known = sorted((batch_size, plan.total_bytes) for batch_size, plan in self._of(case).items())
        if len(known) < 2:
            return min(2 * low, self._limit) if low else 1
        # The two beside the answer: totals may bend elsewhere.
        end = len(known) if high is None else max(2, 1 + [batch_size for batch_size, _ in known].index(high))
        (b0, t0), (b1, t1) = known[end - 2 : end]
        bytes_per_row = max(1.0, (t1 - t0) / (b1 - b0))
        guess = int(b1 + (self._usable_bytes - t1) / bytes_per_row)
        if high is None:
            return min(max(low + 1, guess), self._limit)
        # Near the end the guess repeats a bound; its neighbour is tried instead.
        return min(max(guess, low + 1), high - 1)

    def _of(self, case: Case) -> dict[int, Plan]:
        return self._plans.setdefault(with_batch(case, 1), {})

    def _plan(self, case: Case, batch_size: int) -> Plan:
        plans = self._of(case)
        if batch_size not in plans:
            from rlhfbench.planning.predict import plan_case

            plans[batch_size] = plan_case(with_batch(case, batch_size), self._zero)
        return plans[batch_size]


def with_batch(case: Case, batch_size: int) -> Case:
    """``case`` with another batch, as one micro-batch in one mini-batch."""
    options = case.options.replace({"engine.micro_batch_size": None, "ppo.num_mini_batches": 1})
    return dataclasses.replace(case, batch_size=batch_size, options=options)
