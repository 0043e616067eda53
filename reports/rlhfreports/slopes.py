"""How times grow with lengths and batch sizes: slopes of straight lines through log-log points.

A slope of 1 is a time in proportion to the size, 0 one that does not depend on it. A line goes through cases of one
method that differ in one size alone, by least squares on the logarithms of the medians; two points give a slope without
an error, fewer give none.

A sequence grows in one of three ways, and a line goes along one of them: its prompt alone (at one completion length),
its completion alone, or both in the run's proportion.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from rlhfreports.columns import AXES, axes_that_vary, methods_in_order, setting_order, shared_axes_text
from rlhfreports.panels import Metric, is_measured
from rlhfreports.table import ABSENT, escape

if TYPE_CHECKING:
    from rich.console import RenderableType

GENERATE_COLUMN = "generate_phase_median_s"
LEAST_POINTS_FOR_ERROR = 3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Cases that one line goes through.

    Attributes:
        size: the column that grows along it.
        held: what is the same along it, in words.
        rows: the cases.
    """

    size: str
    held: str
    rows: pd.DataFrame


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    """One kind of slope.

    Attributes:
        name: what is fitted; ``EXPLANATION`` says it in full.
        seconds: the upright values of some rows; NA where they have none.
        lines: the lines through rows of one method that differ in sizes alone, smaller ones first.
    """

    name: str
    seconds: Metric
    lines: Callable[[pd.DataFrame], Iterator[Line]]


def _along_batches(rows: pd.DataFrame) -> Iterator[Line]:
    for (prompt_len, completion_len), line in rows.groupby(["prompt_len", "completion_len"], sort=True):
        yield Line(size="batch_size", held=f"length {prompt_len}+{completion_len}", rows=line)


def _along_lengths(rows: pd.DataFrame) -> Iterator[Line]:
    return (dataclasses.replace(line, size="seq_len") for line in _along_prompts(rows))


def _along_prompts(rows: pd.DataFrame) -> Iterator[Line]:
    """Along the prompt where the completion is held; else along the sequence."""
    for batch_size, group in rows.groupby("batch_size", sort=True):
        for line in _ways_to_grow(group):
            held = f"batch {batch_size}, {line.held}" if line.held else f"batch {batch_size}"
            yield dataclasses.replace(line, held=held)


def _ways_to_grow(rows: pd.DataFrame) -> Iterator[Line]:
    """The lines through ``rows`` of one batch size: in proportion, else at one completion or one prompt length."""
    if _is_in_proportion(rows):
        yield Line(size="seq_len", held="", rows=rows)
        return
    for held, size, name in (("completion_len", "prompt_len", "completion"), ("prompt_len", "seq_len", "prompt")):
        for length, line in rows.groupby(held, sort=True):
            if line["seq_len"].nunique() > 1:
                yield Line(size=size, held=f"{name} {length}", rows=line)


def _is_in_proportion(rows: pd.DataFrame) -> bool:
    """Whether both parts grow, and one prompt fraction, rounded down to whole tokens, gives every split."""
    if min(rows["prompt_len"].nunique(), rows["completion_len"].nunique()) < 2:
        return False
    prompts, lengths = (rows[name].to_numpy(dtype=float) for name in ("prompt_len", "seq_len"))
    # A fraction f gives the prompt p of a length n where p <= f n < p + 1; a prompt of one token may be rounded up.
    least, most = np.where(prompts > 1, prompts / lengths, 0.0).max(), ((prompts + 1) / lengths).min()
    return bool(least < most)


def _decode(rows: pd.DataFrame) -> pd.Series[float]:
    if GENERATE_COLUMN not in rows:
        return pd.Series(math.nan, index=rows.index)
    return rows[GENERATE_COLUMN].astype("float64") / rows["completion_len"].astype("float64")


def _update(rows: pd.DataFrame) -> pd.Series[float]:
    return rows["update_s_per_sample"].astype("float64") * rows["batch_size"].astype("float64")


def _total(rows: pd.DataFrame) -> pd.Series[float]:
    return rows["total_s_per_sample"].astype("float64")


QUANTITIES = (
    Quantity(name="decode s/token", seconds=_decode, lines=_along_prompts),
    Quantity(name="update s/step", seconds=_update, lines=_along_batches),
    Quantity(name="update s/step", seconds=_update, lines=_along_lengths),
    Quantity(name="total s/sample", seconds=_total, lines=_along_lengths),
)
# Names of the sizes: in files, then in a terminal.
SIZES = {
    "batch_size": ("batch size", "batch"),
    "prompt_len": ("prompt length", "prompt"),
    "seq_len": ("sequence length", "length"),
}
_SHORT = dict(SIZES.values())
EXPLANATION = (
    "Slopes of log time against log size, by least squares on the medians; 1: in proportion. Decode: the generate "
    "phase over the tokens of one completion, for the whole batch, the prompt's pass included. Update: all update "
    "phases of a step. Total: all phases."
)

# The columns of the CSV, one row a line.
_COLUMNS = {
    "method": "string",
    "method_title": "string",
    **{axis: "Int64" if axis in ("lora_rank", "seed") else "string" for axis in AXES},
    **dict.fromkeys(("quantity", "against", "held"), "string"),
    "num_points": "Int64",
    **dict.fromkeys(("smallest", "largest"), "Int64"),
    **dict.fromkeys(("slope", "standard_error", "r_squared"), "Float64"),
}
_SHARED = ("method", "method_title", *AXES)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SlopeTable:
    """The slopes of a run.

    Attributes:
        caption: what all lines have in common.
        axes: what tells the cases of different lines apart, beside method and sizes.
        frame: one row a line: the method and its axes, ``quantity``, the size it is fitted ``against``, what is
            ``held``, ``num_points``, the ``smallest`` and ``largest`` size, ``slope``, and, from three points on, its
            ``standard_error`` and ``r_squared``.
    """

    caption: str
    axes: tuple[str, ...]
    frame: pd.DataFrame

    def markdown(self) -> str:
        """The table as GitHub's Markdown, one row a line."""
        words = ("method", *(axis.replace("_", " ") for axis in self.axes), "time", "against", "at", "from–to")
        numbers = ("points", "slope", "standard error", "R²")
        lines = [f"**{escape(self.caption)}**", ""] if self.caption else []
        lines += [f"| {' | '.join((*words, *numbers))} |", f"|{' --- |' * len(words)}{' ---: |' * len(numbers)}"]
        for row in self.frame.to_dict("records"):
            cells = [row["method_title"], *(_word(row[axis]) for axis in self.axes), row["quantity"], row["against"]]
            cells += [row["held"], f"{row['smallest']}–{row['largest']}", str(row["num_points"]), f"{row['slope']:.3f}"]
            cells += [ABSENT if pd.isna(row[name]) else f"{row[name]:.3f}" for name in ("standard_error", "r_squared")]
            lines.append(f"| {' | '.join(escape(cell) for cell in cells)} |")
        lines += ["", EXPLANATION]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Every column at full precision, empty where absent."""
        return self.frame.to_csv(index=False, lineterminator="\n")

    def rich(self) -> RenderableType:
        """One row a method, for a terminal: of each kind the line with the most points, of those the largest."""
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        kinds = self.frame[["quantity", "against"]].drop_duplicates().itertuples(index=False, name=None)
        groups = self.frame.groupby(["method", *self.axes], sort=False, dropna=False)
        table = Table(title=Text(f"Slopes {self.caption}"), box=box.SIMPLE_HEAD, title_justify="left", padding=0)
        columns = {
            "method": [str(rows["method_title"].iloc[0]) for _, rows in groups],
            **{axis.replace("_", " "): [_word(rows[axis].iloc[0]) for _, rows in groups] for axis in self.axes},
        }
        num_words = len(columns)
        for quantity, against in kinds:
            shown = [
                _longest(rows[(rows["quantity"] == quantity) & (rows["against"] == against)]) for _, rows in groups
            ]
            held = list(dict.fromkeys(str(line["held"]) for line in shown if line is not None))
            # What every method's line holds stands above; else each line says it.
            cells = ["" if line is None else _slope_text(line, with_held=len(held) > 1) for line in shown]
            heading = [str(quantity), f"by {_SHORT[against]}", *held[: len(held) == 1]]
            columns["\n".join(heading)] = cells
        for i, name in enumerate(columns):
            table.add_column(Text(name), justify="left" if i < num_words else "right", no_wrap=i == 0)
        for row in zip(*columns.values(), strict=True):
            table.add_row(*map(Text, row))
        return Group(table, Text("Slopes of log-log lines; 1: in proportion. All of them: slopes.md.", style="dim"))


def slope_table(frame: pd.DataFrame) -> SlopeTable:
    """The slopes of every line through two or more measured cases of ``frame``.

    Args:
        frame: a table with the columns of ``rlhfreports.columns``.
    """
    measured = frame[is_measured(frame)]
    rows = []
    for place, quantity in enumerate(QUANTITIES):
        for _, group in measured.groupby(["method", *AXES], sort=False, dropna=False):
            for line in quantity.lines(group):
                fitted = _fit(line, quantity)
                if fitted:
                    first = group.iloc[0]
                    rows.append({"_place": place, **{name: first[name] for name in _SHARED}, **fitted})
    found = pd.DataFrame(
        {name: pd.array([row.get(name) for row in rows], dtype=dtype) for name, dtype in _COLUMNS.items()}  # type: ignore[call-overload]
    )
    found["method_title"] = found["method_title"].fillna(found["method"])
    return SlopeTable(
        caption=shared_axes_text(frame), axes=tuple(axes_that_vary(frame)), frame=_ordered(found, rows, frame)
    )


def _ordered(found: pd.DataFrame, rows: list[dict[str, Any]], frame: pd.DataFrame) -> pd.DataFrame:
    """By quantity, then by what is held, then by method and setting: lines that compare stand together."""
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
    """The columns of ``line`` that are not of its case; nothing where fewer than two sizes have a time."""
    from scipy.stats import linregress

    seconds = quantity.seconds(line.rows)
    usable = (seconds > 0) & (seconds < math.inf)
    sizes = line.rows.loc[usable, line.size].to_numpy(dtype=float)
    if len(set(sizes)) < 2:
        return None
    logs = np.log(seconds[usable].to_numpy(dtype=float))
    fit = linregress(np.log(sizes), logs)
    has_error = len(sizes) >= LEAST_POINTS_FOR_ERROR
    return {
        "quantity": quantity.name,
        "against": SIZES[line.size][0],
        "held": line.held,
        "num_points": len(sizes),
        "smallest": int(min(sizes)),
        "largest": int(max(sizes)),
        "slope": float(fit.slope),
        "standard_error": float(fit.stderr) if has_error else None,
        # Of points on one level there is no variance to explain.
        "r_squared": float(fit.rvalue) ** 2 if has_error and np.ptp(logs) > 0 else None,
    }


def _longest(rows: pd.DataFrame) -> pd.Series[Any] | None:
    """The row with the most points; of several the last, which has the largest cases."""
    if rows.empty:
        return None
    longest = rows[rows["num_points"] == rows["num_points"].max()]
    last: pd.Series[Any] = longest.iloc[-1]
    return last


def _slope_text(row: pd.Series[Any], *, with_held: bool) -> str:
    error = "" if pd.isna(row["standard_error"]) else f" ±{row['standard_error']:.2f}"
    held = f" ({row['held']})" if with_held else ""
    return f"{row['slope']:.2f}{error}{held}"


def _word(value: object) -> str:
    return ABSENT if pd.isna(value) else str(value)  # type: ignore[call-overload]
