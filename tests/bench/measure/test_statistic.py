"""The statistic and its interval, against definitions of their own and in simulation."""

import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rlhfbench.measure.statistic import (
    DEFAULT_BLOCKS,
    fast_mean,
    half_width,
    half_width_of_midmean,
    influences_on_fast_mean,
    midmean,
    midmean_of,
)

seconds = st.floats(0.001, 1000)


@given(st.lists(st.fixed_dictionaries({"a": seconds, "b": seconds}), min_size=1, max_size=30))
def test_phases_add_up_to_the_midmean_of_the_totals(steps):
    found = midmean(steps, ("a", "b"))
    assert math.fsum(found.values()) == pytest.approx(midmean_of([step["a"] + step["b"] for step in steps]))


@given(st.lists(seconds, min_size=1, max_size=40))
def test_the_midmean_is_the_mean_of_the_middle_half(values):
    # Every value four times over: the middle half is then a whole number of values.
    quadrupled = np.sort(np.repeat(values, 4))
    assert midmean_of(values) == pytest.approx(quadrupled[len(values) : 3 * len(values)].mean())


def test_a_slow_step_in_four_changes_nothing():
    assert midmean_of([1.0, 1.0, 1.0, 1.0]) == midmean_of([1.0, 1.0, 1.0, 50.0]) == 1.0


def test_a_phase_that_did_not_run_took_no_time():
    assert midmean([{"a": 1.0}, {"a": 1.0, "b": 2.0}], ("a", "b")) == {"a": 1.0, "b": 1.0}


def test_the_interval_of_the_midmean_is_tukeys_and_mclaughlins():
    values = [float(v) for v in stats.lognorm.rvs(0.3, size=16, random_state=0)]
    trimmed = stats.trim_mean(values, 0.25)
    winsorized = np.asarray(stats.mstats.winsorize(np.array(values), limits=(0.25, 0.25)))
    error = winsorized.std(ddof=1) / (0.5 * math.sqrt(len(values)))
    assert half_width_of_midmean(values) == pytest.approx(stats.t.ppf(0.975, 7) * error / trimmed)
    assert half_width_of_midmean(values[:5]) == math.inf


def test_the_interval_of_blocks_is_students():
    values = [1.0, 1.2, 0.9, 1.1]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert half_width(values) == pytest.approx((high - low) / 2)
    assert half_width([1.0]) is None


@given(st.lists(seconds, min_size=1, max_size=40))
def test_weights_of_the_fast_mean_fall_from_the_fastest_value_to_none_at_the_median(values):
    # The integral of the values' quantile function, by the midpoint rule: exact where no value begins inside a cell.
    cells = np.arange(0.5, 2 * len(values)) / (2 * len(values))
    weights = np.maximum(4 - 8 * cells, 0) / (2 * len(values))
    quantiles = np.sort(values)[(cells * len(values)).astype(int)]
    assert fast_mean(values) == pytest.approx(float(weights @ quantiles))


def test_slow_values_beyond_the_median_change_no_fast_mean():
    assert fast_mean([1.0, 2.0, 1.0, 2.0]) == fast_mean([1.0, 1.0, 50.0, 9.0]) == 1.0


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_influences_give_the_error_of_a_fast_mean(sigma):
    """Beside the spread of the fast means of 2,000 samples; the two sides of a pair share half of their variance."""
    rng = np.random.default_rng(0)
    shared, old, new = rng.normal(0, sigma, (3, 2000, 40))
    found, errors = [], []
    for base, head in zip((shared + old).tolist(), (shared + new).tolist(), strict=True):
        found.append(fast_mean(head) - fast_mean(base))
        pulls = np.subtract(influences_on_fast_mean(head), influences_on_fast_mean(base))
        errors.append(pulls.std(ddof=1) / math.sqrt(40))
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(found), rel=0.05)


NUM_BLOCKS, NUM_STEPS, NUM_CASES = DEFAULT_BLOCKS, 8, 10


def independent(rng, num):
    return [rng.gauss(0, 0.1) for _ in range(num)]


def autocorrelated(rng, num):
    """AR(1) with coefficient 0.8 over all steps of the run, so that the steps of a block rise and fall together."""
    found, value = [], rng.gauss(0, 0.1)
    for _ in range(num):
        value = 0.8 * value + rng.gauss(0, 0.1 * math.sqrt(1 - 0.8**2))
        found.append(value)
    return found


def drifting(rng, num):
    """The machine slows down by a fifth over the run, and has noise."""
    return [0.2 * (step / num - 0.5) + rng.gauss(0, 0.03) for step in range(num)]


def simulated_run(rng, noise):
    """Values by block of the cases of one run, each of 1 s: rounds of blocks, in random order as in a run."""
    values = {case: [] for case in range(NUM_CASES)}
    steps = iter(noise(rng, NUM_BLOCKS * NUM_CASES * NUM_STEPS))
    for _ in range(NUM_BLOCKS):
        for case in rng.sample(range(NUM_CASES), NUM_CASES):
            values[case].append(midmean_of([1 + next(steps) for _ in range(NUM_STEPS)]))
    return values


@pytest.mark.parametrize("noise", [independent, autocorrelated, drifting])
def test_intervals_from_blocks_cover_the_truth(noise):
    """At least 90 % of the intervals of a case hold 1 s, and of the ratios of two cases hold 1."""
    rng = random.Random(0)
    covered, ratios_covered, num_runs = 0, 0, 150
    for _ in range(num_runs):
        values = simulated_run(rng, noise)
        for blocks in values.values():
            covered += abs(statistics.fmean(blocks) - 1) <= half_width(blocks)
        for case in range(0, NUM_CASES, 2):
            logs = [math.log(a / b) for a, b in zip(values[case], values[case + 1], strict=True)]
            ratios_covered += abs(statistics.fmean(logs)) <= half_width(logs)
    assert covered / (num_runs * NUM_CASES) >= 0.9
    assert ratios_covered / (num_runs * NUM_CASES / 2) >= 0.9


def test_steps_of_one_block_do_not_cover_the_truth():
    """Why blocks: an interval from the steps of one block is far too narrow where steps are autocorrelated."""
    rng = random.Random(0)
    covered = 0
    for _ in range(500):
        steps = [1 + value for value in autocorrelated(rng, NUM_BLOCKS * NUM_STEPS)]
        covered += abs(midmean_of(steps) - 1) <= half_width_of_midmean(steps) * midmean_of(steps)
    assert covered / 500 < 0.7
