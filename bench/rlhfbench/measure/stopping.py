"""When the timing pass has warmed up, and when it has measured enough."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Sequence
from typing import Literal

Reason = Literal["precise", "steady", "budget"]

_CONFIDENCE = 0.95
_MAX_WARM_UP_STEPS = 5
_WARM_UP_SHARE = 0.2
_WARM_UP_CHANGE = 0.1
_MIN_SAMPLES = 3
_NOISE_ESTIMATES = 8
_NOISE_CHANGE = 0.1
# Of fewer samples than this no estimate of the noise is worth comparing.
_MIN_NOISE_SAMPLES = 5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoppingRule:
    """When to stop.

    Attributes:
        precision: the relative half-width of the median's confidence interval that is precise enough.
        budget_s: seconds for the warm-up and the timing pass together.
    """

    precision: float
    budget_s: float

    def is_warm(self, steps_s: Sequence[float]) -> bool:
        """Whether the warm-up's steps so far are enough.

        They are when the last two differ by less than 10 %, after five in any case, and when they have taken a fifth of
        the budget. There is at least one.
        """
        if not steps_s:
            return False
        if len(steps_s) >= _MAX_WARM_UP_STEPS or sum(steps_s) >= _WARM_UP_SHARE * self.budget_s:
            return True
        return len(steps_s) >= 2 and abs(steps_s[-1] - steps_s[-2]) < _WARM_UP_CHANGE * steps_s[-2]

    def reason_to_stop(self, steps_s: Sequence[float], spent_s: float) -> Reason | None:
        """Why the timing pass should stop after these steps, or ``None`` if it should not.

        Args:
            steps_s: the timed steps so far, at least one.
            spent_s: what the case has taken of its budget, the warm-up and all between the steps included.
        """
        if half_width_of_median(steps_s) <= self.precision:
            return "precise"
        if is_noise_steady(steps_s):
            return "steady"
        enough = len(steps_s) >= _MIN_SAMPLES or max(steps_s) >= self.budget_s
        return "budget" if enough and spent_s >= self.budget_s else None


def half_width_of_median(samples: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of the median, relative to the median.

    The interval is between two order statistics, so it assumes nothing of the distribution: the number of samples below
    the true median is binomial with p = ½. Fewer than six samples have no such interval: infinite.
    """
    rank = _rank(len(samples))
    if rank == 0:
        return math.inf
    ordered = sorted(samples)
    width = ordered[len(ordered) - rank] - ordered[rank - 1]
    return width / 2 / statistics.median(ordered)


def relative_noise(samples: Sequence[float]) -> float:
    """The standard deviation, relative to the mean: it moves smoothly as samples come, whatever their distribution."""
    return statistics.pstdev(samples) / statistics.fmean(samples)


def is_noise_steady(samples: Sequence[float]) -> bool:
    """Whether more samples would teach nothing new about the noise: its last eight estimates are within 10 %."""
    if len(samples) < _MIN_NOISE_SAMPLES + _NOISE_ESTIMATES - 1:
        return False
    ends = range(len(samples) - _NOISE_ESTIMATES + 1, len(samples) + 1)
    estimates = [relative_noise(samples[:end]) for end in ends]
    return max(estimates) - min(estimates) <= _NOISE_CHANGE * statistics.median(estimates)


@functools.cache
def _rank(num_samples: int) -> int:
    """The largest k for which the k-th smallest and k-th largest sample enclose the median with 95 %; 0: none does."""
    rank, outside = 0, 0.0
    while True:
        outside += 2 * math.comb(num_samples, rank) * 0.5**num_samples
        if outside > 1 - _CONFIDENCE:
            return rank
        rank += 1
