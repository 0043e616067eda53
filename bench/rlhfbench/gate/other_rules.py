"""The rules of two other tools, so that the self-test can say what they would have said of the same data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

THRESHOLD = 1.1
_ASV_P_VALUE = 0.002


def is_slower_by_threshold(base: Sequence[float], head: Sequence[float]) -> bool:
    """``pytest-benchmark --benchmark-compare-fail=mean:10%``: the head's mean is 10 % above that of a stored run.

    Args:
        base: Seconds of the stored run's steps.
        head: Seconds of the new run's steps.
    """
    return statistics.fmean(head) > THRESHOLD * statistics.fmean(base)


def differs_by_asv(base: Sequence[float], head: Sequence[float]) -> bool:
    """``asv continuous`` with its factor of 1.1: medians 10 % apart, and a Mann-Whitney U test below 0.002.

    With too few samples for such a p-value, the 99 % intervals of the medians must not overlap. asv then takes order
    statistics, which for so few samples are the smallest and the largest.

    Args:
        base: Seconds of the base's steps.
        head: Seconds of the head's steps.
    """
    from scipy.stats import mannwhitneyu

    ratio = statistics.median(head) / statistics.median(base)
    if 1 / THRESHOLD <= ratio <= THRESHOLD:
        return False
    if 1 / math.comb(len(base) + len(head), len(base)) < _ASV_P_VALUE:
        return bool(mannwhitneyu(base, head).pvalue < _ASV_P_VALUE)
    return max(base) < min(head) or max(head) < min(base)
