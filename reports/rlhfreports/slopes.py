"""The table of slopes: fits of time against lengths and batch sizes, see ``rlhfreports.fits``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pandas as pd

from rlhfreports.columns import (
    AXES,
    CASE_AXES,
    CONDITIONS,
    HOST,
    axes_of,
    axes_that_vary,
    is_measured,
    methods_in_order,
    setting_order,
    shared_axes_text,
    time_notes,
)
from rlhfreports.fits import QUANTITIES, SIZES, fit, needed_columns
from rlhfreports.layouts import Column
from rlhfreports.once import once_per_frame
from rlhfreports.ratios import interval_decimals
from rlhfreports.tables import ReportTable, text
from rlhfreports.terminal import terminal

if TYPE_CHECKING:
    from rich.console import RenderableType

_SHORT = dict(SIZES.values())
EXPLANATION = (
    "Slopes of log time against log size, by least squares; 1: in proportion. ±: half of the 95 % interval, from "
    "blocks. Standard error: of a straight line. Decode: the generate phase per token of one completion, for the whole "
    "batch, prefill included. Update: all update phases of a step. Total: all phases."
)

# The columns of the CSV, which has one row per line; it lacks the axes that the frame lacks.
_COLUMNS = {
    "method": "string",
    "method_title": "string",
    HOST: "string",
    CONDITIONS: "string",
    **{axis: "Int64" if axis in ("lora_rank", "seed") else "string" for axis in CASE_AXES},
    **dict.fromkeys(("quantity", "against", "held"), "string"),
    "num_points": "Int64",
    **dict.fromkeys(("smallest", "largest"), "Int64"),
    **dict.fromkeys(("slope", "half_width", "standard_error", "r_squared"), "Float64"),
}
_SHARED = ("method", "method_title", *AXES)


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
    measured = frame.loc[is_measured(frame), needed_columns(frame)]
    rows = []
    for place, quantity in enumerate(QUANTITIES):
        for _, group in measured.groupby(["method", *axes_of(frame)], sort=False, dropna=False):
            for line in quantity.lines(group):
                fitted = fit(line, quantity)
                if fitted:
                    first = group.iloc[0]
                    rows.append({"_place": place, **{name: first.get(name) for name in _SHARED}, **fitted})
    columns: dict[str, Any] = {
        name: pd.array([row.get(name) for row in rows], dtype=dtype)  # type: ignore[call-overload]
        for name, dtype in _COLUMNS.items()
        if name in frame or name not in AXES
    }
    found = pd.DataFrame(columns)
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
    texts = [slope_cells(*pair, most=3) for pair in zip(found["slope"], found["half_width"], strict=True)]
    numbers: dict[str, Any] = {
        "points": found["num_points"],
        "slope": [slope for slope, _ in texts],
        "±": [width or None for _, width in texts],
        **{
            heading: [None if pd.isna(value) else f"{value:.3f}" for value in found[name]]
            for heading, name in (("standard error", "standard_error"), ("R²", "r_squared"))
        },
    }
    return SlopeTable(
        caption=shared_axes_text(frame),
        cells=pd.DataFrame({name: [text(value) for value in values] for name, values in {**words, **numbers}.items()}),
        num_text_columns=len(words),
        explanation=EXPLANATION,
        notes=tuple(time_notes(frame)),
        frame=found,
        axes=axes,
        methods=tuple(methods_in_order(frame)["method"]),
    )


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


def _longest(rows: pd.DataFrame) -> pd.Series[Any] | None:
    """The row with the most points, the last of several, which has the largest cases."""
    if rows.empty:
        return None
    longest = rows[rows["num_points"] == rows["num_points"].max()]
    last: pd.Series[Any] = longest.iloc[-1]
    return last


def _slope_text(row: pd.Series[Any], *, with_held: bool) -> str:
    slope, width = slope_cells(row["slope"], row["half_width"])
    held = f" ({row['held']})" if with_held else ""
    return f"{slope}{width and f' ±{width}'}{held}"


def slope_cells(slope: float, half_width: object, most: int = 2) -> tuple[str, str]:
    """A slope and half of its interval as text, with as many decimals as the interval carries and at ``most``."""
    if pd.isna(half_width):  # type: ignore[call-overload]
        return f"{round(slope, most) + 0.0:.{most}f}", ""  # no negative zero
    width = float(str(half_width))
    decimals = min(interval_decimals(abs(slope), width), most)
    return f"{round(slope, decimals) + 0.0:.{decimals}f}", f"{width:.{decimals}f}"
