"""The rules of other tools."""

from __future__ import annotations

import pytest

from rlhfbench.gate.other_rules import Rule, differs_by_asv, is_slower_by_threshold


@pytest.mark.parametrize(("head", "says"), [(1.09, False), (1.11, True), (0.5, False)])
def test_a_threshold_looks_at_means_and_at_slower_alone(head, says):
    assert is_slower_by_threshold([0.9, 1.1], [head]) is says


SPREAD = [0.01 * number for number in range(10)]


@pytest.mark.parametrize(
    ("base", "head", "says"),
    [
        ([1 + x for x in SPREAD], [1.08 + x for x in SPREAD], False),  # sure, and below the factor
        ([1 + x for x in SPREAD], [1.3 + x for x in SPREAD], True),
        ([1.3 + x for x in SPREAD], [1 + x for x in SPREAD], True),
        ([1 + 20 * x for x in SPREAD], [1.2 + 20 * x for x in SPREAD], False),  # beyond it, and not sure
        ([1.0, 1.1], [1.3, 1.4], True),  # too few for the test: they do not overlap
        ([1.0, 1.35], [1.3, 1.4], False),
        ([0.0] * 10, [1 + x for x in SPREAD], True),  # a phase that the base never enters
        ([0.0] * 10, [0.0] * 10, False),
    ],
)
def test_asv_wants_a_factor_and_a_small_p_value(base, head, says):
    assert differs_by_asv(base, head) is says


@pytest.mark.parametrize(("is_interleaved", "asked"), [(False, ([1, 2], [7, 8])), (True, ([1, 2, 5, 6], [3, 4, 7, 8]))])
def test_a_stored_run_and_a_session_in_turns_take_other_steps_of_two_pairs(is_interleaved, asked):
    pairs = [[[{"total": value} for value in side] for side in pair] for pair in (([1, 2], [3, 4]), ([5, 6], [7, 8]))]
    seen = []
    rule = Rule(flags=lambda base, head: not seen.append((base, head)), is_interleaved=is_interleaved)
    assert rule.flagged(["total"], *pairs) == {"total"}
    assert seen == [asked]
