import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfbench.measure.statistic import half_width_of_midmean
from rlhfbench.measure.stopping import StoppingRule, is_noise_steady, relative_noise

times = st.floats(0.001, 1000)
RULE = StoppingRule(precision=0.02, budget_s=100.0)


def run(draw, rule=RULE, max_samples=500):
    """Returns the samples of synthetic steps until the rule stops, and its reason."""
    samples = []
    while len(samples) < max_samples:
        samples.append(draw(len(samples)))
        reason = rule.reason_to_stop(samples, sum(samples))
        if reason is not None:
            return samples, reason
    return samples, None


def test_equal_steps_are_precise_at_the_first_interval():
    samples, reason = run(lambda i: 1.0)
    assert reason == "precise"
    assert len(samples) == 6


def test_constant_noise_ends_steady():
    rng = random.Random(0)
    samples, reason = run(lambda i: rng.lognormvariate(0, 1), StoppingRule(precision=0.001, budget_s=1e9))
    assert reason == "steady"
    assert len(samples) < 100


def test_a_little_noise_ends_precise():
    rng = random.Random(0)
    samples, reason = run(lambda i: rng.gauss(1.0, 0.03), StoppingRule(precision=0.02, budget_s=1e9))
    assert reason in ("precise", "steady")
    assert abs(statistics.median(samples) - 1.0) < 0.03


def test_the_budget_ends_timing_after_two_samples_at_the_earliest():
    samples, reason = run(lambda i: 60.0 + i)
    assert reason == "budget"
    assert len(samples) == 2


def test_one_step_longer_than_the_budget_is_enough():
    assert run(lambda i: 101.0) == ([101.0], "budget")


def test_two_samples_are_taken_even_if_the_warm_up_spent_the_budget():
    assert RULE.reason_to_stop([1.0], spent_s=1000.0) is None
    assert RULE.reason_to_stop([1.0, 2.0], spent_s=1000.0) == "budget"


@pytest.mark.parametrize(
    ("steps_s", "warm"),
    [
        ([], False),
        ([1.0], False),
        ([5.0, 1.0], False),
        ([5.0, 1.0, 1.05], True),
        ([1.0, 1.2], False),
        ([1.0, 2.0, 1.0, 2.0], False),
        ([1.0, 2.0, 1.0, 2.0, 1.0], True),  # never steady: five steps are the maximum
        ([20.0], True),  # a fifth of the budget
    ],
)
def test_warm_up(steps_s, warm):
    assert RULE.is_warm(steps_s) is warm


@given(st.lists(times, min_size=6, max_size=40), st.floats(0.01, 100), st.randoms())
def test_neither_unit_nor_order_matters(samples, factor, rng):
    scaled = [sample * factor for sample in samples]
    rng.shuffle(scaled)
    assert half_width_of_midmean(scaled) == pytest.approx(half_width_of_midmean(samples))
    assert relative_noise(scaled) == pytest.approx(relative_noise(samples))


@given(st.lists(times, min_size=1, max_size=60), st.floats(0, 1000))
def test_timing_always_ends(samples, spent_s):
    reason = RULE.reason_to_stop(samples, spent_s)
    if spent_s >= RULE.budget_s and (len(samples) >= 2 or max(samples) >= RULE.budget_s):
        assert reason is not None
    if reason == "budget":
        assert spent_s >= RULE.budget_s


def test_noise_is_relative_to_the_mean():
    assert relative_noise([1.0, 3.0]) == 0.5


def test_changing_noise_is_not_steady():
    assert is_noise_steady([1.0, 2.0] * 20)
    assert not is_noise_steady([1.0, 2.0] * 5)
    assert not is_noise_steady([1.0] * 12 + [1.0 + 0.5 * i for i in range(8)])
