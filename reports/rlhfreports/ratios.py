"""Ratios of times with their intervals, and what differences a run can tell apart.

Blocks of the same number were timed in one round of the run, so what drifted during the run hit both alike. The
interval of a ratio therefore comes from the ratios of blocks, pair by pair.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from rlhfreports.columns import axes_of, is_measured
from rlhfreports.once import once_per_frame

_SIZE = ("prompt_len", "completion_len", "batch_size")
_MAX_DECIMALS = 3  # of a ratio


@dataclasses.dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of two times.

    Attributes:
        value: the ratio.
        low: lower end of its 95 % interval; ``None`` without two pairs of blocks.
        high: upper end.
    """

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def is_above_one(self) -> bool:
        """True if the whole interval lies above 1; never true without one."""
        return self.low is not None and self.low > 1

    @property
    def half_width(self) -> float | None:
        """The larger distance from the value to an end of the interval."""
        return None if self.low is None or self.high is None else max(self.high - self.value, self.value - self.low)

    def __str__(self) -> str:
        """The ratio as ``1.26x (1.21 to 1.31)``, rounded to its interval, whose ends are not equally far from it."""
        if self.low is None or self.high is None or self.half_width is None:
            return f"{self.value:.2f}x"
        decimals = min(interval_decimals(self.value, self.half_width), _MAX_DECIMALS)
        low, high = (_beside_one(end, decimals) for end in (self.low, self.high))
        return f"{self.value:.{decimals}f}x ({low} to {high})"


def _beside_one(end: float, decimals: int) -> str:
    """An end of an interval, with more decimals where it would be 1: on which side it lies decides."""
    while decimals < _MAX_DECIMALS and round(end, decimals) == 1:
        decimals += 1
    return f"{end:.{decimals}f}"


def ratio(above: Mapping[Any, Any] | pd.Series[Any], below: Mapping[Any, Any] | pd.Series[Any]) -> Ratio:
    """Returns the ratio of the seconds per sample of two rows of a frame.

    It is the geometric mean of the ratios of blocks with the same number, and its interval Student's t of their
    logarithms. Without two such pairs it is the ratio of the means.
    """
    pairs = zip(blocks_of(above), blocks_of(below), strict=False)
    logs = [math.log(a / b) for a, b in pairs if a is not None and b is not None and a > 0 and b > 0]
    if len(logs) < 2:
        return Ratio(float(above["total_s_per_sample"]) / float(below["total_s_per_sample"]))
    value = math.exp(statistics.fmean(logs))
    spread = t_quantile(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(value, value * math.exp(-spread), value * math.exp(spread))


def blocks_of(
    row: Mapping[Any, Any] | pd.Series[Any], column: str = "total_block_s_per_sample"
) -> Sequence[float | None]:
    """The values of ``column`` by block; empty where the record has none."""
    values = row.get(column)
    return values if isinstance(values, list) else []


def t_quantile(degrees: float) -> float:
    """Returns the 97.5 % quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))


def interval_decimals(value: float, half_width: float) -> int:
    """Decimals of a value with this half-width.

    One digit of the half-width is shown, two if it begins with 1, and at least the first digit of the value.
    """
    if not 0 < half_width < math.inf:
        return 3
    exponent = math.floor(math.log10(half_width))
    decimals = -exponent + (1 if half_width < 2 * 10.0**exponent else 0)
    return max(0, decimals, -math.floor(math.log10(value)) if value > 0 else 0)


def rounded(value: float, half_width: object) -> str:
    """``value`` with the decimals that its interval carries, or with three significant digits where it has none."""
    if pd.isna(half_width):  # type: ignore[call-overload]
        return f"{value:.3g}"
    return f"{value:.{interval_decimals(value, float(str(half_width)))}f}"


@once_per_frame
def control_ratios(frame: pd.DataFrame) -> list[Ratio]:
    """Returns the ratios of methods that do the same work as another one, case by case: each should be 1."""
    found = []
    axes = [*axes_of(frame), *_SIZE]
    # Few rows and columns: with all of them, 1,000 cases took 4 s.
    involved = {*frame["method"][frame["same_work_as"].notna()], *frame["same_work_as"].dropna()}
    of_controls = frame[frame["method"].isin(involved)]
    measured = of_controls[is_measured(of_controls)]
    narrow = measured[[*axes, "method", "same_work_as", "total_s_per_sample", "total_block_s_per_sample"]]
    for _, rows in narrow.groupby(axes, sort=False, dropna=False):
        by_method = {row["method"]: row for row in rows.to_dict("records")}
        for row in by_method.values():
            other = by_method.get(row["same_work_as"]) if isinstance(row["same_work_as"], str) else None
            if other is not None:
                found.append(ratio(other, row))
    return found


def resolvable(frame: pd.DataFrame) -> float | None:
    """Returns the least relative difference of two times that a run can tell apart; ``None`` where it is not known.

    Where methods that do the same work were run, it is the larger of what they differ by at most and the median width
    of their ratios' intervals. Else it is the median, over cases, of the half-width of a difference of two such cases.
    """
    return _resolvable(frame, control_ratios(frame))


def _resolvable(frame: pd.DataFrame, controls: Sequence[Ratio]) -> float | None:
    widths = [r.half_width / r.value for r in controls if r.half_width is not None]
    if widths:
        return max(_largest_difference(controls), statistics.median(widths))
    relative = (frame["total_half_width_s_per_sample"] / frame["total_s_per_sample"]).dropna().tolist()
    return math.sqrt(2) * statistics.median(relative) if relative else None


def resolution(frame: pd.DataFrame) -> str:
    """Returns one sentence on the differences that this run can tell apart, which are those of ``resolvable``."""
    controls = control_ratios(frame)
    bound = _resolvable(frame, controls)
    if bound is None:
        return "Every case was timed in one block: how sure the times are is not known."
    if any(r.half_width is not None for r in controls):
        several = len(controls) > 1
        pairs = f"{len(controls)} pairs" if several else "a pair"
        differ = "differ by up to" if several else "differs by"
        return (
            f"This run tells apart differences above {percent(bound)}: {pairs} of cases that do the same work "
            f"{differ} {percent(_largest_difference(controls))}."
        )
    return f"This run tells apart differences above {percent(bound)}, by its intervals."


def _largest_difference(controls: Sequence[Ratio]) -> float:
    return math.expm1(max(abs(math.log(r.value)) for r in controls))


def percent(share: float) -> str:
    """``share`` in percent, with one decimal below 10 %."""
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"
