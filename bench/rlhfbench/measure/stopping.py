"""The stopping rule of timing: when the warm-up ends, and when there are enough samples."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Literal

from rlhfbench.measure.statistic import half_width_of_midmean

Reason = Literal["precise", "steady", "budget"]

_MAX_WARM_UP_STEPS = 5
_WARM_UP_SHARE = 0.2
_WARM_UP_CHANGE = 0.1
_MIN_SAMPLES = 2
_NOISE_ESTIMATES = 8
_NOISE_CHANGE = 0.1
# Standard deviations of fewer samples vary too much to be compared.
_MIN_NOISE_SAMPLES = 5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoppingRule:
    """Decides when warm-up and timing end.

    Attributes:
        precision: Relative half-width of the mid-mean's 95 % confidence interval at which timing ends.
        budget_s: Seconds for warm-up and timing together.
    """

    precision: float
    budget_s: float

    def is_warm(self, steps_s: Sequence[float]) -> bool:
        """Returns ``True`` if the warm-up is done after steps of ``steps_s`` seconds.

        It is done when the last two steps differ by less than 10 %, after five steps, or when a fifth of the budget is
        spent, whichever comes first; and never before one step.
        """
        if not steps_s:
            return False
        if len(steps_s) >= _MAX_WARM_UP_STEPS or sum(steps_s) >= _WARM_UP_SHARE * self.budget_s:
            return True
        return len(steps_s) >= 2 and abs(steps_s[-1] - steps_s[-2]) < _WARM_UP_CHANGE * steps_s[-2]

    def reason_to_stop(self, steps_s: Sequence[float], spent_s: float) -> Reason | None:
        """Returns why timing should stop now, or ``None`` to go on.

        Args:
            steps_s: Seconds of each timed step so far, at least one.
            spent_s: Seconds spent so far, including the warm-up and everything between steps.

        Returns:
            ``precise``: the mid-mean is known to ``precision``. ``steady``: the noise is constant, so more steps would
            only narrow the interval as 1/√n. ``budget``: the budget is spent.
        """
        if half_width_of_midmean(steps_s) <= self.precision:
            return "precise"
        if is_noise_steady(steps_s):
            return "steady"
        enough = len(steps_s) >= _MIN_SAMPLES or max(steps_s) >= self.budget_s
        return "budget" if enough and spent_s >= self.budget_s else None


def relative_noise(samples: Sequence[float]) -> float:
    """Returns the standard deviation relative to the mean. It changes smoothly with each sample, unlike quantiles."""
    return statistics.pstdev(samples) / statistics.fmean(samples)


def is_noise_steady(samples: Sequence[float]) -> bool:
    """Returns ``True`` if the last eight estimates of the relative noise, one per sample, lie within 10 %."""
    if len(samples) < _MIN_NOISE_SAMPLES + _NOISE_ESTIMATES - 1:
        return False
    ends = range(len(samples) - _NOISE_ESTIMATES + 1, len(samples) + 1)
    estimates = [relative_noise(samples[:end]) for end in ends]
    return max(estimates) - min(estimates) <= _NOISE_CHANGE * statistics.median(estimates)
