"""Slopes of time against lengths and batch sizes: straight lines through log-log points.

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
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from rlhfreports.columns import (
    CASE_AXES,
    HOST,
    axes_of,
    axes_that_vary,
    hosts_note,
    is_measured,
    methods_in_order,
    setting_order,
    shared_axes_text,
)
from rlhfreports.once import once_per_frame
from rlhfreports.ratios import t_quantile
from rlhfreports.tables import ReportTable, text
from rlhfreports.terminal import Column, terminal

if TYPE_CHECKING:
    from rich.console import RenderableType

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
        factor: what makes them that time, for each row.
        lines: the lines through rows of one method that differ in sizes alone, smaller ones first.
    """

    name: str
    column: str
    factor: Callable[[pd.DataFrame], Floats]
    lines: Callable[[pd.DataFrame], Iterator[Line]]


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


def _as_it_is(rows: pd.DataFrame) -> Floats:
    return np.ones(len(rows))


def _a_token(rows: pd.DataFrame) -> Floats:
    return 1 / rows["completion_len"].to_numpy(dtype=float)


def _a_step(rows: pd.DataFrame) -> Floats:
    return rows["batch_size"].to_numpy(dtype=float)


QUANTITIES = (
    Quantity(name="decode s/token", column=GENERATE_COLUMN, factor=_a_token, lines=_along_prompts),
    Quantity(name="update s/step", column="update_s_per_sample", factor=_a_step, lines=_along_batches),
    Quantity(name="update s/step", column="update_s_per_sample", factor=_a_step, lines=_along_lengths),
    Quantity(name="total s/sample", column="total_s_per_sample", factor=_as_it_is, lines=_along_lengths),
)
_TIME_ENDS = ("s_per_sample", "block_s_per_sample")
_SIZES = ["prompt_len", "completion_len", "seq_len", "batch_size"]
# Names of the sizes, in files and in a terminal.
SIZES = {
    "batch_size": ("batch size", "batch"),
    "prompt_len": ("prompt length", "prompt"),
    "seq_len": ("sequence length", "length"),
}
_SHORT = dict(SIZES.values())
# Of a frame, what ``slope_by_length`` reads.
SLOPE_COLUMNS = [*_SIZES, *(f"{kind}_{end}" for kind in ("total", "inference", "update") for end in _TIME_ENDS)]
EXPLANATION = (
    "Slopes of log time against log size, by least squares; 1: in proportion. ±: half of the 95 % interval, from "
    "blocks. Standard error: of a straight line. Decode: the generate phase per token of one completion, for the whole "
    "batch, prefill included. Update: all update phases of a step. Total: all phases."
)

# The columns of the CSV, which has one row per line.
_COLUMNS = {
    "method": "string",
    "method_title": "string",
    HOST: "string",
    **{axis: "Int64" if axis in ("lora_rank", "seed") else "string" for axis in CASE_AXES},
    **dict.fromkeys(("quantity", "against", "held"), "string"),
    "num_points": "Int64",
    **dict.fromkeys(("smallest", "largest"), "Int64"),
    **dict.fromkeys(("slope", "half_width", "standard_error", "r_squared"), "Float64"),
}
_SHARED = ("method", "method_title", HOST, *CASE_AXES)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SlopeTable(ReportTable):
    """The slopes of a run, one row per line.

    Attributes:
        axes: the axes on which the cases of different lines differ.
        methods: the methods in the order of reports.

    The columns of ``frame`` are those of ``slopes.csv``: the method and its axes, ``quantity``, the size it is fitted
    ``against``, the sizes that are ``held``, ``num_points``, the ``smallest`` and ``largest`` size, ``slope``, from two
    blocks on the ``half_width`` of its interval, and from three points on its ``standard_error`` and ``r_squared``.
    """

    axes: tuple[str, ...]
    methods: tuple[str, ...]

    def rich(self) -> RenderableType:
        """One row per method for a terminal: of each kind the line with the most points, of those the largest."""
        kinds = self.frame[["quantity", "against"]].drop_duplicates().itertuples(index=False, name=None)
        groups = [rows for _, rows in self.frame.groupby(["method", *self.axes], sort=False, dropna=False)]
        groups.sort(key=lambda rows: self.methods.index(rows["method"].iloc[0]))
        columns = {
            "method": [str(rows["method_title"].iloc[0]) for rows in groups],
            **{axis.replace("_", " "): [text(rows[axis].iloc[0]) for rows in groups] for axis in self.axes},
        }
        num_words = len(columns)
        for quantity, against in kinds:
            shown = [_longest(rows[(rows["quantity"] == quantity) & (rows["against"] == against)]) for rows in groups]
            held = list(dict.fromkeys(str(line["held"]) for line in shown if line is not None))
            # Sizes that all methods hold stand in the heading, others in each cell.
            cells = ["" if line is None else _slope_text(line, with_held=len(held) > 1) for line in shown]
            heading = [str(quantity), f"by {_SHORT[against]}", *held[: len(held) == 1]]
            columns["\n".join(heading)] = cells
        footer = ["Slopes of log-log lines; 1: in proportion. All of them: slopes.md."]
        return terminal(
            f"Slopes {self.caption}",
            [
                Column(heading=name, cells=cells, is_word=i < num_words)
                for i, (name, cells) in enumerate(columns.items())
            ],
            footer,
        )


@once_per_frame
def slope_table(frame: pd.DataFrame) -> SlopeTable:
    """Fits every line through two or more measured cases of ``frame``.

    Args:
        frame: a frame of ``rlhfbench.records_frame``; see ``rlhfreports.columns``.
    """
    measured = frame.loc[is_measured(frame), _needed(frame)]
    rows = []
    for place, quantity in enumerate(QUANTITIES):
        for _, group in measured.groupby(["method", *axes_of(frame)], sort=False, dropna=False):
            for line in quantity.lines(group):
                fitted = _fit(line, quantity)
                if fitted:
                    first = group.iloc[0]
                    rows.append({"_place": place, **{name: first.get(name) for name in _SHARED}, **fitted})
    columns: dict[str, Any] = {
        name: pd.array([row.get(name) for row in rows], dtype=dtype)  # type: ignore[call-overload]
        for name, dtype in _COLUMNS.items()
    }
    found = pd.DataFrame(columns)
    found["method_title"] = found["method_title"].fillna(found["method"])
    found = _ordered(found, rows, frame)
    axes = tuple(axes_that_vary(frame))
    words: dict[str, Any] = {
        "method": found["method_title"],
        **{axis.replace("_", " "): found[axis] for axis in axes},
        "time": found["quantity"],
        "against": found["against"],
        "at": found["held"],
        "from–to": [f"{row['smallest']}–{row['largest']}" for row in found.to_dict("records")],
    }
    numbers: dict[str, Any] = {
        "points": found["num_points"],
        **{
            heading: [None if pd.isna(value) else f"{value:.3f}" for value in found[name]]
            for heading, name in (
                ("slope", "slope"),
                ("±", "half_width"),
                ("standard error", "standard_error"),
                ("R²", "r_squared"),
            )
        },
    }
    return SlopeTable(
        caption=shared_axes_text(frame),
        cells=pd.DataFrame({name: [text(value) for value in values] for name, values in {**words, **numbers}.items()}),
        num_text_columns=len(words),
        explanation=EXPLANATION,
        notes=(note,) if (note := hosts_note(frame)) else (),
        frame=found,
        axes=axes,
        methods=tuple(methods_in_order(frame)["method"]),
    )


def slope_by_length(rows: pd.DataFrame, column: str) -> tuple[float, float | None] | None:
    """The slope of one time against sequence length, with half of its 95 % interval.

    Args:
        rows: measured cases of one line, at most one a length.
        column: such as ``total_s_per_sample``.

    Returns:
        ``None`` where fewer than two lengths have a time; no interval with fewer than two blocks.
    """
    quantity = Quantity(name=column, column=column, factor=_as_it_is, lines=_along_lengths)
    fitted = _fit(Line(size="seq_len", held="", rows=rows), quantity)
    return None if fitted is None else (fitted["slope"], fitted["half_width"])


def _needed(frame: pd.DataFrame) -> list[str]:
    """The columns that slopes need: with all of them, most of the time went into copies."""
    times = [name for pair in _BLOCK_COLUMNS.items() for name in pair if name in frame]
    return ["method", "method_title", *axes_of(frame), *_SIZES, *times]


def _ordered(found: pd.DataFrame, rows: list[dict[str, Any]], frame: pd.DataFrame) -> pd.DataFrame:
    """Sorted by quantity, held sizes, method and setting, so that comparable lines stand together."""
    methods = {name: i for i, name in enumerate(methods_in_order(frame)["method"])}
    settings = {name: i for i, name in enumerate(setting_order(frame))}
    placed = found.assign(
        _place=[row["_place"] for row in rows],
        _held=pd.factorize(found["held"])[0],
        _method=found["method"].map(methods),
        _setting=found["setting"].map(settings),
    )
    order = placed.sort_values(["_place", "_held", "_method", "_setting"], kind="stable").index
    return found.loc[order].reset_index(drop=True)


def _fit(line: Line, quantity: Quantity) -> dict[str, Any] | None:
    """The fit of ``line``, ``None`` where fewer than two sizes have a time."""
    if quantity.column not in line.rows:
        return None
    factor = quantity.factor(line.rows)
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


def _longest(rows: pd.DataFrame) -> pd.Series[Any] | None:
    """The row with the most points, the last of several, which has the largest cases."""
    if rows.empty:
        return None
    longest = rows[rows["num_points"] == rows["num_points"].max()]
    last: pd.Series[Any] = longest.iloc[-1]
    return last


def _slope_text(row: pd.Series[Any], *, with_held: bool) -> str:
    error = "" if pd.isna(row["half_width"]) else f" ±{row['half_width']:.2f}"
    held = f" ({row['held']})" if with_held else ""
    return f"{row['slope']:.2f}{error}{held}"
