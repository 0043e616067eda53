"""The rules of two other tools, and what they would have said of the same steps."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

# Seconds by quantity of every step: of the base, and of the head.
Steps = Sequence[Sequence[Mapping[str, float]]]

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

    old_s, new_s = statistics.median(base), statistics.median(head)
    if old_s <= THRESHOLD * new_s and new_s <= THRESHOLD * old_s:
        return False
    if 1 / math.comb(len(base) + len(head), len(base)) < _ASV_P_VALUE:
        return bool(mannwhitneyu(base, head).pvalue < _ASV_P_VALUE)
    return max(base) < min(head) or max(head) < min(base)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Another tool's rule.

    Attributes:
        flags: Called with the seconds of the base's and of the head's steps; True where they are called different.
        is_interleaved: The tool runs both sides in one session, in turns; else the base is a stored run.
    """

    flags: Callable[[Sequence[float], Sequence[float]], bool]
    is_interleaved: bool

    def flagged(self, names: Iterable[str], first: Steps, second: Steps) -> set[str]:
        """Returns the quantities that are called different.

        Args:
            names: The quantities that are asked for.
            first: Steps of one pair of processes.
            second: Steps of a later pair. A stored run has the base of the first and the head of this one.
        """
        sides = zip(first, second, strict=True)
        base, head = [[*old, *new] for old, new in sides] if self.is_interleaved else (first[0], second[1])
        return {name for name in names if self.flags([step[name] for step in base], [step[name] for step in head])}


OTHERS = {
    "pytest-benchmark's 10 % on means": Rule(flags=is_slower_by_threshold, is_interleaved=False),
    "asv's factor 1.1": Rule(flags=differs_by_asv, is_interleaved=True),
}
