"""Ticks of logarithmic axes and their labels."""

from __future__ import annotations

import math
from collections.abc import Sequence


def spaced(lengths: Sequence[int], span: float, least_share: float = 0.11) -> list[int]:
    """The ``lengths`` that have room for a label: always the last, and no two closer than ``least_share``.

    Args:
        lengths: the lengths, rising.
        span: ratio of the ends of the axis.
        least_share: least distance between two labels, as a share of the width of the axis.
    """
    kept: list[int] = []
    for length in reversed(lengths):
        if not kept or math.log(kept[-1] / length) >= least_share * math.log(span):
            kept.append(length)
    return kept[::-1]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` to ``high``: at least three where two significant digits allow it."""
    ticks: list[float] = []
    for mantissas in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), tuple(i / 10 for i in range(10, 100))):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        # From text, as 3 * 10**-1 is not 0.3.
        ticks = [tick for k in decades for m in mantissas if low <= (tick := float(f"{m}e{k}")) <= high]
        if len(ticks) >= 3:
            break
    return ticks


def plain_number(value: float) -> str:
    """``value`` without an exponent: ``0.0005``, ``64``, ``1024``, ``10,000``."""
    if value >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.12f}".rstrip("0").rstrip(".")
