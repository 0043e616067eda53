"""Ratios of pairs of blocks, and their errors, from the steps of two records."""

from __future__ import annotations

import math
import statistics

import pytest

from rlhfbench.gate.pairs import LogRatio, pairs_of
from rlhfbench.measure.statistic import error_of_midmean, influences_on_fast_mean


def test_the_ratio_of_a_pair_in_turns_is_that_of_its_rounds():
    """Drift that both sides share, and one disturbed step, leave both ratios alone."""
    drift = [1.0, 2.0, 3.0, 4.0, 5.0]

    def record(factor, last):
        return one_phase([factor * step for step in drift[:-1]] + [last])

    (pair,) = pairs_of(record(1.0, 5.0), record(1.1, 50.0))
    assert logs_of(pair.ratios["generate"]) == pytest.approx([math.log(1.1)] * 2)
    # The mean over the middle half of 2.2, 3.3, 4.4, 50 and 1.1 s: weights of 3/4, 1 and 3/4 of 5/2, for two samples.
    assert pair.head["total"] == pytest.approx((0.75 * 2.2 + 3.3 + 0.75 * 4.4) / 2.5 / 2)
    (swapped,) = pairs_of(record(1.1, 50.0), record(1.0, 5.0))
    assert logs_of(swapped.ratios["total"]) == pytest.approx([-math.log(1.1)] * 2)


def one_phase(seconds, *, in_turns=True):
    block = {"phases": {"generate": seconds}, "in_turns": in_turns, "error": None}
    latency = {"phases": {"generate": {"kind": "inference"}}, "blocks": [block, block]}
    return {"case": {"batch_size": 2}, "latency": latency}


def logs_of(ratios):
    return [ratio.value for ratio in ratios]


@pytest.mark.parametrize("num_rounds", [7, 8])
def test_the_errors_of_a_pair_are_those_of_its_steps(num_rounds):
    """From eight steps on, one disturbed step is no part of either mean; fewer are too few to leave one out."""
    sides = [one_phase([1.0] * (num_rounds - 1) + [last]) for last in (1.0, 2.0)]
    (pair,) = pairs_of(*sides)
    # The standard error of one value beside n - 1 equal ones is their difference, over n.
    plain = math.log(2.0) / 7
    expected = (0.0, 0.0) if num_rounds == 8 else (1.3 * plain, plain)
    assert set(pair.ratios) == {"total", "inference", "generate"}
    for ratios in pair.ratios.values():
        assert [ratio.error for ratio in ratios] == pytest.approx(expected)


@pytest.mark.parametrize("num_steps", [7, 8])
def test_blocks_that_share_no_rounds_add_up_their_errors(num_steps):
    """Steps in any order, and more of them on one side, make no difference."""
    seconds = [1.0, 1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.5][:num_steps]
    shuffled = [1.1 * value for value in (*seconds[::-1], *seconds)]
    (pair,) = pairs_of(one_phase(seconds, in_turns=False), one_phase(shuffled, in_turns=False))
    logs = [math.log(value) for value in seconds]
    assert logs_of(pair.ratios["total"]) == pytest.approx([math.log(1.1)] * 2, abs=0.02)
    if num_steps == 7:
        errors = [1.3 * statistics.stdev(logs) / math.sqrt(7), statistics.stdev(logs) / math.sqrt(7)]
    else:
        errors = [statistics.stdev(influences_on_fast_mean(logs)) / math.sqrt(8), error_of_midmean(logs)]
    found = [ratio.error for ratio in pair.ratios["total"]]
    # The other side has twice as many steps, so its variance is about half.
    assert [error / own for error, own in zip(found, errors, strict=True)] == pytest.approx(
        [math.sqrt(1.5)] * 2, rel=0.2
    )


def test_a_change_of_some_steps_shows_in_the_mid_mean():
    """The fast mean leaves out the slower half of the steps, the mid-mean a quarter at either end."""
    (pair,) = pairs_of(one_phase([1.0] * 8), one_phase([1.0, 1.1] * 4))
    assert logs_of(pair.ratios["total"]) == pytest.approx([0.0, math.log(1.1) / 2])


def test_a_phase_that_few_steps_have_is_compared_by_its_sum():
    """The middle half of the steps has none of it."""
    (pair,) = pairs_of(one_phase([0.0, 0.0, 0.0, 2.0] * 2), one_phase([0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 4.0]))
    assert pair.ratios["generate"] == (LogRatio(pytest.approx(math.log(1.5)), 0.0),)
    assert (pair.base["generate"], pair.head["generate"]) == (0.25, 0.375)  # of two samples
    (never,) = pairs_of(one_phase([0.0] * 8), one_phase([0.0] * 8))
    assert (never.ratios, never.base["generate"]) == ({}, 0.0)
    (new,) = pairs_of(one_phase([0.0] * 8), one_phase([0.0, 1.0] * 4))
    assert new.ratios == {}
