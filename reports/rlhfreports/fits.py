"""Fits of time against lengths and batch sizes: straight lines through log-log points.

A slope of 1 is a time in proportion to the size, 0 a time that does not depend on it. A line goes through cases of one
method that differ in one size alone, by least squares on the logarithms of the seconds. It needs two points.
The interval of a slope comes from the blocks: a line is fitted through the blocks of each number. The standard error is
that of one line through three points or more, and says how straight it is.

Sequences grow in one of three ways, each with its own lines: the prompt alone (at one completion length), the
completion alone, or both in proportion.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from rlhfreports.columns import axes_of
from rlhfreports.ratios import t_quantile

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

GENERATE_COLUMN = "generate_phase_s"
MIN_POINTS_FOR_ERROR = 3
# The column with the values by block of each time.
_BLOCK_COLUMNS = {
    GENERATE_COLUMN: "generate_phase_block_s",
    "inference_s_per_sample": "inference_block_s_per_sample",
    "update_s_per_sample": "update_block_s_per_sample",
    "total_s_per_sample": "total_block_s_per_sample",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """The cases of one line.

    Attributes:
        size: the column that grows along the line.
        held: the sizes that all cases share, in words.
        rows: the cases.
    """

    size: str
    held: str
    rows: pd.DataFrame


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    """One kind of slope.

    Attributes:
        name: the time that is fitted; ``EXPLANATION`` has the definition.
        column: seconds of each row; ``_BLOCK_COLUMNS`` has those of its blocks.
        factor: a size and its power, which make them that time.
        lines: the lines through rows of one method that differ in sizes alone, smaller ones first.
    """

    name: str
    column: str
    lines: Callable[[pd.DataFrame], Iterator[Line]]
    factor: tuple[str, int] = ("batch_size", 0)


def _along_batches(rows: pd.DataFrame) -> Iterator[Line]:
    for (prompt_len, completion_len), line in rows.groupby(["prompt_len", "completion_len"], sort=True):
        yield Line(size="batch_size", held=f"length {prompt_len}+{completion_len}", rows=line)


def _along_lengths(rows: pd.DataFrame) -> Iterator[Line]:
    return (dataclasses.replace(line, size="seq_len") for line in _along_prompts(rows))


def _along_prompts(rows: pd.DataFrame) -> Iterator[Line]:
    """Lines along the prompt where the completion is held, else along the sequence."""
    for batch_size, group in rows.groupby("batch_size", sort=True):
        for line in _ways_to_grow(group):
            held = f"batch {batch_size}, {line.held}" if line.held else f"batch {batch_size}"
            yield dataclasses.replace(line, held=held)


def _ways_to_grow(rows: pd.DataFrame) -> Iterator[Line]:
    """Lines through ``rows`` of one batch size: in proportion, else at one completion length or one prompt length."""
    if _is_in_proportion(rows):
        yield Line(size="seq_len", held="", rows=rows)
        return
    for held, size, name in (("completion_len", "prompt_len", "completion"), ("prompt_len", "seq_len", "prompt")):
        for length, line in rows.groupby(held, sort=True):
            if line["seq_len"].nunique() > 1:
                yield Line(size=size, held=f"{name} {length}", rows=line)


def _is_in_proportion(rows: pd.DataFrame) -> bool:
    """True when both parts grow and one prompt fraction, rounded down to whole tokens, gives every split."""
    if min(rows["prompt_len"].nunique(), rows["completion_len"].nunique()) < 2:
        return False
    prompts, lengths = (rows[name].to_numpy(dtype=float) for name in ("prompt_len", "seq_len"))
    # A fraction f gives the prompt p of a length n where p <= f n < p + 1; a prompt of one token may be rounded up.
    least, most = np.where(prompts > 1, prompts / lengths, 0.0).max(), ((prompts + 1) / lengths).min()
    return bool(least < most)


QUANTITIES = (
    Quantity(name="decode s/token", column=GENERATE_COLUMN, factor=("completion_len", -1), lines=_along_prompts),
    Quantity(name="update s/step", column="update_s_per_sample", factor=("batch_size", 1), lines=_along_batches),
    Quantity(name="update s/step", column="update_s_per_sample", factor=("batch_size", 1), lines=_along_lengths),
    Quantity(name="total s/sample", column="total_s_per_sample", lines=_along_lengths),
)
_TIME_ENDS = ("s_per_sample", "block_s_per_sample")
_SIZES = ["prompt_len", "completion_len", "seq_len", "batch_size"]
# Names of the sizes, in files and in a terminal.
SIZES = {
    "batch_size": ("batch size", "batch"),
    "prompt_len": ("prompt length", "prompt"),
    "seq_len": ("sequence length", "length"),
}
# Of a frame, what ``slope_by_length`` reads.
SLOPE_COLUMNS = [*_SIZES, *(f"{kind}_{end}" for kind in ("total", "inference", "update") for end in _TIME_ENDS)]


def needed_columns(frame: pd.DataFrame) -> list[str]:
    """The columns that slopes need: with all of them, most of the time went into copies."""
    times = [name for pair in _BLOCK_COLUMNS.items() for name in pair if name in frame]
    return ["method", "method_title", *axes_of(frame), *_SIZES, *times]


def fit(line: Line, quantity: Quantity) -> dict[str, Any] | None:
    """The fit of ``line``, ``None`` where fewer than two sizes have a time."""
    if quantity.column not in line.rows:
        return None
    name, power = quantity.factor
    factor = line.rows[name].to_numpy(dtype=float) ** power
    seconds = line.rows[quantity.column].to_numpy(dtype=float, na_value=math.nan) * factor
    sizes = line.rows[line.size].to_numpy(dtype=float)
    usable = (seconds > 0) & (seconds < math.inf) & (sizes > 0)  # a record may hold anything
    sizes = sizes[usable]
    if len(set(sizes)) < 2:
        return None
    logs = np.log(seconds[usable])
    log_sizes = np.log(sizes)
    slope = statistics.linear_regression(log_sizes.tolist(), logs.tolist()).slope
    has_error = len(sizes) >= MIN_POINTS_FOR_ERROR
    # Equal times have no variance to explain.
    varies = np.ptp(logs) > 0
    r_squared = (
        min(statistics.correlation(log_sizes.tolist(), logs.tolist()) ** 2, 1.0) if has_error and varies else 0.0
    )
    error = math.sqrt((1 - r_squared) * np.var(logs) / np.var(log_sizes) / (len(sizes) - 2)) if has_error else None
    return {
        "quantity": quantity.name,
        "against": SIZES[line.size][0],
        "held": line.held,
        "num_points": len(sizes),
        "smallest": int(min(sizes)),
        "largest": int(max(sizes)),
        "slope": slope,
        "half_width": _half_width(line.rows[usable], sizes, _BLOCK_COLUMNS[quantity.column], factor[usable]),
        "standard_error": error,
        "r_squared": r_squared if has_error and varies else None,
    }


def _half_width(rows: pd.DataFrame, sizes: Floats, column: str, factor: Floats) -> float | None:
    """Half the 95 % interval of the slope, from a fit for each block that every point has."""
    num_blocks = min(map(len, _block_lists(rows, "total_block_s_per_sample")), default=0)
    if num_blocks < 2:
        return None
    # As one array: a frame for each line took three times as long as the rest of a report.
    padding = [None] * num_blocks
    lists = [[*values, *padding][:num_blocks] for values in _block_lists(rows, column)]
    seconds = (np.array(lists, dtype=float) * factor[:, None]).T
    whole = seconds[(seconds > 0).all(axis=1)]
    if len(whole) < 2:
        return None
    slopes = np.polyfit(np.log(sizes), np.log(whole).T, 1)[0]
    return float(t_quantile(len(slopes) - 1) * np.std(slopes, ddof=1) / math.sqrt(len(slopes)))


def _block_lists(rows: pd.DataFrame, column: str) -> list[list[float | None]]:
    """The values by block of each row, empty where its record has none."""
    return [values if isinstance(values, list) else [] for values in rows[column]]


def slope_by_length(rows: pd.DataFrame, column: str) -> tuple[float, float | None] | None:
    """The slope of one time against sequence length, with half of its 95 % interval.

    Args:
        rows: measured cases of one line, at most one a length.
        column: such as ``total_s_per_sample``.

    Returns:
        ``None`` where fewer than two lengths have a time; no interval with fewer than two blocks.
    """
    quantity = Quantity(name=column, column=column, lines=_along_lengths)
    fitted = fit(Line(size="seq_len", held="", rows=rows), quantity)
    return None if fitted is None else (fitted["slope"], fitted["half_width"])
