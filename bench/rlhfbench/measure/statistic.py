"""The statistic of timed steps, and its interval from blocks.

A block is a stretch of timed steps in a process of its own. Steps of one block share what disturbs them, so they are
not independent; the blocks of a case lie apart in a run, in random order with those of other cases. The interval
therefore comes from the blocks' values alone, whatever the noise inside a block.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

CONFIDENCE = 0.95
# Blocks of a case by default. The 97.5 % quantile of Student's t falls from 12.7 at two blocks over 4.3 at three to
# 3.2 at four, 2.8 at five and 2.4 at eight. A fifth block makes the default run of 30 cases half a minute longer.
DEFAULT_BLOCKS = 4


def midmean(steps: Sequence[Mapping[str, float]], names: Iterable[str]) -> dict[str, float]:
    """Returns the mean of each phase over the middle half of the steps, ranked by their total.

    The weights of the steps are the same for every phase, so phases add up to the total: a median of each phase does
    not. Steps at the borders of the middle half count in part (three steps weigh 1/4, 1 and 1/4).

    Args:
        steps: Seconds by phase of each step, at least one. A phase that is missing took 0 s.
        names: The phases to average.
    """
    ranked = sorted(steps, key=lambda step: math.fsum(step.values()))
    weights = _middle_weights(len(ranked))
    total = math.fsum(weights)
    return {
        name: math.fsum(weight * step.get(name, 0.0) for weight, step in zip(weights, ranked, strict=True)) / total
        for name in names
    }


def _middle_weights(num: int) -> list[float]:
    """Weights of ranked values: the part of each value's n-th of [0, 1] that lies in [1/4, 3/4], times n."""
    return [max(0.0, min(rank + 1, 0.75 * num) - max(rank, 0.25 * num)) for rank in range(num)]


def midmean_of(values: Sequence[float]) -> float:
    """Returns the mean of the middle half of ``values``."""
    return midmean([{"": value} for value in values], ("",))[""]


def half_width_of_midmean(values: Sequence[float]) -> float:
    """Returns half the width of the mid-mean's 95 % confidence interval, relative to the mid-mean.

    The interval is Tukey and McLaughlin's for a trimmed mean. It takes the values as independent, so it says when to
    stop and not how sure a figure is. Infinite below six values: fewer leave too few in the middle.
    """
    num = len(values)
    if num < 6:
        return math.inf
    return _t_quantile(num - 2 * (num // 4) - 1) * error_of_midmean(values) / midmean_of(values)


def error_of_midmean(values: Sequence[float]) -> float:
    """Returns the standard error of the mid-mean of independent values, of which there are at least two.

    It is Tukey and McLaughlin's for a trimmed mean: the standard deviation is that of the winsorized values.
    """
    num, cut = len(values), len(values) // 4
    ranked = sorted(values)
    winsorized = [min(max(value, ranked[cut]), ranked[-1 - cut]) for value in ranked]
    return statistics.stdev(winsorized) / ((1 - 2 * cut / num) * math.sqrt(num))


def fast_mean(values: Sequence[float]) -> float:
    """Returns a mean of the faster half of ``values``: weights fall linearly from the fastest to 0 at the median.

    Other load can only make a step slower, so the fastest steps say most of the code (Chen and Revels, "Robust
    benchmarking in noisy environments", 2016, who take the fastest alone).
    """
    num = len(values)
    weights = [_weight_of_fastest((rank + 1) / num) - _weight_of_fastest(rank / num) for rank in range(num)]
    return math.fsum(weight * value for weight, value in zip(weights, sorted(values), strict=True))


def influences_on_fast_mean(values: Sequence[float]) -> list[float]:
    """Returns the influence of each of the values on their ``fast_mean``, but for a constant.

    The standard error of a sum of fast means is the standard deviation of the sum of their influences, divided by the
    square root of the number of values (Huber, "Robust Statistics", section 3.3: L-estimates).
    """
    num = len(values)
    ranked = sorted(range(num), key=values.__getitem__)
    found = [0.0] * num
    for rank in range(1, num):
        last, place = ranked[rank - 1], ranked[rank]
        found[place] = found[last] + _density(rank / num) * (values[place] - values[last])
    return found


def _density(share: float) -> float:
    """The density of weights at this share of the ranked values; its integral over [0, 1] is 1."""
    return max(0.0, 4 - 8 * share)


def _weight_of_fastest(share: float) -> float:
    """The weight of the fastest ``share`` of the values: the integral of their density."""
    return 1 - (1 - min(2 * share, 1.0)) ** 2


def half_width(values: Sequence[float]) -> float | None:
    """Returns half the width of the 95 % confidence interval of the mean; ``None`` for fewer than two values.

    The values are those of blocks: Student's t interval.
    """
    if len(values) < 2:
        return None
    return _t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def _t_quantile(degrees: int) -> float:
    from scipy.special import stdtrit  # a tenth of a second to import, and only reports and workers need it

    return float(stdtrit(degrees, (1 + CONFIDENCE) / 2))
