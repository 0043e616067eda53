"""Decisions of the gate, against textbooks and in simulation."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rlhfbench.gate.decide import (
    MAX_LOOKS,
    MIN_PAIRS,
    PAIRS_PER_LOOK,
    SIGNIFICANCE,
    Effects,
    Estimate,
    Levels,
    counted_pairs,
    estimate,
    estimate_unpaired,
    estimates_of,
    holm,
    judge,
    judge_memory,
    share_done,
    spent_level,
)

EFFECTS = Effects()


def test_an_estimate_is_students():
    logs = [0.1, 0.12, 0.05, 0.2]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(logs), scale=stats.sem(logs))
    found = estimate(logs)
    assert (found.ratio, found.num_pairs) == (pytest.approx(math.exp(np.mean(logs))), 4)
    assert (found.low, found.high) == pytest.approx((math.exp(low), math.exp(high)))
    assert found.p_value == pytest.approx(stats.ttest_1samp(logs, 0).pvalue)


def test_pairs_without_spread_are_certain():
    assert estimate([0.0] * 4).p_value == 1.0
    assert estimate([0.1] * 4).p_value == 0.0


def test_pairs_of_equal_errors_have_students_interval():
    logs = [0.1, 0.12, 0.05, 0.2]  # of a standard error of 0.03: the rounds explain less
    found, plain = estimate(logs, [0.01] * 4), estimate(logs)
    assert (found.ratio, found.low, found.high) == pytest.approx((plain.ratio, plain.low, plain.high))


def test_the_interval_is_hartung_and_knapps():
    """The formulas of Hartung and Knapp (2001), with DerSimonian and Laird's variance, in matrices."""
    logs, errors = np.array([0.10, 0.02, 0.07, -0.05, 0.3]), np.array([0.02, 0.03, 0.02, 0.04, 0.2])
    fixed = np.diag(errors**-2)
    projection = fixed - np.outer(fixed.sum(0), fixed.sum(0)) / fixed.sum()
    between = max(0.0, (logs @ projection @ logs - 4) / np.trace(projection))
    inverse = np.linalg.inv(np.diag(errors**2 + between))
    mean = inverse.sum(0) @ logs / inverse.sum()
    half = stats.t.ppf(0.975, 4) * math.sqrt((logs - mean) @ inverse @ (logs - mean) / 4 / inverse.sum())
    found = estimate(logs.tolist(), errors.tolist())
    assert between > 0
    assert found.ratio == pytest.approx(math.exp(mean))
    assert (found.low, found.high) == pytest.approx((math.exp(mean - half), math.exp(mean + half)))
    assert found.p_value == pytest.approx(2 * stats.t.sf(mean / (half / stats.t.ppf(0.975, 4)), 4))


def test_a_pair_beside_other_load_counts_for_little():
    quiet = estimate([0.05, 0.06, 0.04, 0.05], [0.01] * 4)
    with_one = estimate([0.05, 0.06, 0.04, 0.05, 0.5], [0.01] * 4 + [0.5])
    assert with_one.ratio == pytest.approx(quiet.ratio, rel=0.001)
    assert with_one.high < 1.07 < estimate([0.05, 0.06, 0.04, 0.05, 0.5]).high


def test_pairs_that_agree_by_chance_are_no_surer_than_their_rounds():
    found = estimate([0.08, 0.08, 0.081, 0.08], [0.1] * 4)
    assert found.p_value > 0.1
    assert found.low < 1 < found.high
    assert estimate([0.08, 0.08, 0.081, 0.08]).p_value < 1e-6


def test_a_pair_whose_error_is_not_known_counts_as_a_typical_one():
    logs, errors = [0.1, 0.3, 0.2, 0.9], [0.02, 0.01, 0.03, 0.0]
    assert estimate(logs, errors) == estimate(logs, [*errors[:3], 0.02])


def test_five_rounds_that_agree_by_chance_outweigh_no_other_pairs():
    found = estimate([0.0, 0.0, 0.0, 0.0, 0.05], [0.1, 0.1, 0.1, 0.1, 1e-9])
    assert math.log(found.ratio) == pytest.approx(0.05 * 4 / 8)  # it weighs as much as the other four


@pytest.mark.parametrize("between", [0.0, 0.02])
@pytest.mark.parametrize("num", [4, 14])
def test_pairs_beside_changing_load_are_called_different_no_more_often_than_said(num, between):
    rng = random.Random(f"{num} {between}")
    alarms = 0
    for _ in range(1500):
        errors = [0.01 * math.exp(rng.gauss(0, 1)) for _ in range(num)]
        alarms += estimate([rng.gauss(0, math.hypot(e, between)) for e in errors], errors).p_value < 0.05
    assert alarms / 1500 < 0.065


def test_an_unpaired_estimate_is_welchs():
    base, head = [1.0, 1.1, 0.9], [1.3, 1.2, 1.4, 1.25]
    found = estimate_unpaired(base, head)
    test = stats.ttest_ind(np.log(head), np.log(base), equal_var=False)
    interval = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((math.exp(interval.low), math.exp(interval.high)))
    assert found.p_value == pytest.approx(test.pvalue)
    assert estimate_unpaired([1.0, 1.0], [2.0, 2.0]).p_value == 0.0


def test_holm_by_hand():
    # 0.01 x 4, 0.02 x 3, 0.03 x 2, then never below an earlier one.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_corrects_no_more_than_bonferroni(p_values):
    corrected = holm(p_values)
    ranked = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [corrected[i] for i in ranked] == sorted(corrected)
    assert all(p <= c <= min(1.0, len(p_values) * p) + 1e-12 for p, c in zip(p_values, corrected, strict=True))


def looks():
    """Pairs before each look, and its level, of a comparison that goes through all of them."""
    levels = Levels()
    for look in range(1, MAX_LOOKS + 1):
        yield MIN_PAIRS if look == 1 else PAIRS_PER_LOOK, levels.take(look / MAX_LOOKS)


def test_the_looks_spend_the_significance_level_and_little_of_it_early():
    levels = [level for _, level in looks()]
    assert sum(levels) == pytest.approx(SIGNIFICANCE)
    assert all(level > 0 for level in levels)
    assert levels[0] < 1e-6 < spent_level(0.5) < 0.01


def test_a_comparison_that_ends_early_spends_the_rest_at_its_last_look():
    levels = Levels()
    assert levels.take(0.25) + levels.take(1.0) == pytest.approx(SIGNIFICANCE)
    assert levels.take(1.0) == 0.0


def found(ratio, half, p_value=0.0):
    return Estimate(ratio=ratio, low=ratio - half, high=ratio + half, p_value=p_value, num_pairs=9)


@pytest.mark.parametrize(
    ("estimated", "verdict"),
    [
        (found(1.10, 0.05), "slower"),
        (found(1.10, 0.05, p_value=0.2), "ambiguous"),  # beyond the smallest effect, but not significant
        (found(1.03, 0.005), "slower"),
        (found(1.02, 0.02), "same"),  # significant, but perhaps below the smallest effect, and surely below 5 %
        (found(1.03, 0.005, p_value=0.2), "ambiguous"),  # beyond the smallest effect: never the same
        (found(1.04, 0.03), "ambiguous"),
        (found(0.90, 0.05), "faster"),
        (found(1.00, 0.04, p_value=1.0), "same"),
        (found(1.00, 0.06, p_value=1.0), "ambiguous"),
    ],
)
def test_a_verdict_needs_significance_and_an_effect_that_counts(estimated, verdict):
    assert judge([[estimated]], 0.05, EFFECTS) == [(verdict, (estimated,))]


@pytest.mark.parametrize(
    ("fast", "middle", "verdict", "first"),
    [
        (found(1.00, 0.04), found(1.00, 0.09), "same", 0),  # the second excludes twice the promised effect
        (found(1.00, 0.04), found(1.00, 0.11, p_value=1.0), "ambiguous", 1),
        (found(1.00, 0.04), found(1.10, 0.05), "slower", 1),  # a change of some steps
        (found(1.10, 0.05), found(1.00, 0.04), "slower", 0),
        (found(0.90, 0.05), found(1.10, 0.05), "slower", 1),
        (found(1.00, 0.06, p_value=1.0), found(1.00, 0.06, p_value=1.0), "ambiguous", 0),
    ],
)
def test_a_change_by_any_statistic_is_one_and_all_must_agree_on_none(fast, middle, verdict, first):
    estimates = (fast, middle)
    assert judge([estimates], 0.05, EFFECTS) == [(verdict, (estimates[first], estimates[1 - first]))]


def test_holms_correction_counts_every_statistic():
    # 0.02 and 0.03 alone are below 0.05; of four p-values, the smallest counts four times.
    one = [found(1.1, 0.05, p_value=0.02)]
    assert judge([one], 0.05, EFFECTS)[0][0] == "slower"
    assert judge([one * 2, one * 2], 0.05, EFFECTS)[0][0] == "ambiguous"


def test_a_pair_that_has_one_statistic_counts_with_it_in_all():
    pairs = [((0.1, 0.0), (0.2, 0.0)), ((0.12, 0.0), (0.3, 0.0)), ((0.11, 0.0),)]
    assert estimates_of(pairs) == (estimate([0.1, 0.12, 0.11], [0.0] * 3), estimate([0.2, 0.3, 0.11], [0.0] * 3))
    assert estimates_of(pairs[:2]) == (estimate([0.1, 0.12], [0.0] * 2), estimate([0.2, 0.3], [0.0] * 2))


@pytest.mark.parametrize(
    ("base", "head", "verdict"),
    [
        (100_000, 100_100, "same"), (100_000, 100_101, "larger"), (100_000, 99_899, "smaller"),
        (0, 0, "same"), (0, 1, "larger"), (1, 0, "smaller"),
    ],
)  # fmt: skip
def test_memory_is_compared_to_a_thousandth(base, head, verdict):
    assert judge_memory(base, head) == verdict


def test_disturbed_pairs_are_set_aside_whichever_side_they_belong_to():
    quiet = [(False, False)] * 5
    for disturbed in ((True, False), (False, True), (True, True)):
        assert counted_pairs([*quiet, disturbed, disturbed]) == [True] * 5 + [False] * 2


def test_on_a_machine_that_is_never_quiet_all_pairs_count():
    assert counted_pairs([(True, True)] * 8 + [(False, False)] * 3) == [True] * 11


def simulated(rng, num_cases, spread, slowdown):
    """(the first of ``num_cases`` cases was called slower, number of the others that were called changed)."""
    logs = [[] for _ in range(num_cases)]
    verdicts = ["ambiguous"] * num_cases
    for num_new, level in looks():
        for case, values in enumerate(logs):
            if verdicts[case] == "ambiguous":
                values += [rng.gauss(math.log1p(slowdown) if case == 0 else 0.0, spread) for _ in range(num_new)]
        verdicts = [said for said, _ in judge([[estimate(values)] for values in logs], level, EFFECTS)]
        if "ambiguous" not in verdicts:
            break
    return verdicts[0] == "slower", sum(verdict in ("slower", "faster") for verdict in verdicts[1:])


def test_no_false_alarm_in_200_comparisons_of_cases_without_a_change():
    rng = random.Random(0)
    assert sum(simulated(rng, 10, 0.04, 0.0)[1] for _ in range(23)) == 0


@pytest.mark.parametrize(
    ("slowdown", "spread", "least"), [(0.10, 0.01, 100), (0.10, 0.03, 100), (0.10, 0.05, 95), (0.05, 0.02, 80)]
)
def test_detection_in_simulation(slowdown, spread, least):
    """100 comparisons of ten cases, one of which is slower in one time, by the spread of a pair."""
    rng = random.Random(0)
    found, alarms = zip(*(simulated(rng, 10, spread, slowdown) for _ in range(100)), strict=True)
    assert sum(found) >= least
    assert sum(alarms) == 0


def test_looking_again_raises_no_false_alarm():
    """One case without a change, noise too large to be the same: over all looks at most 5 % are called changed."""
    rng = random.Random(0)
    changed = 0
    for _ in range(600):
        values, verdict = [], "ambiguous"
        for num_new, level in looks():
            values += [rng.gauss(0.0, 0.5) for _ in range(num_new)]
            ((verdict, _),) = judge([[estimate(values)]], level, EFFECTS)
            if verdict != "ambiguous":
                break
        changed += verdict in ("slower", "faster")
    assert changed / 600 <= SIGNIFICANCE


def test_a_comparison_is_as_far_as_its_looks_or_its_time_are():
    assert share_done(2, 6.0, 60.0) == 0.25
    assert share_done(2, 45.0, 60.0) == 0.75
    assert share_done(2, 90.0, 60.0) == 1.0
