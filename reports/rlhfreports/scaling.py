"""Cases over ranks as tables and as a picture: beside each other, and against the number of ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rlhfreports.columns import IN_A_LINE, axes_that_vary, has_splits, parts_of, with_short_options
from rlhfreports.memory import interval_texts
from rlhfreports.ranks import planned_cases, ranked, scaling_points, strategy_place
from rlhfreports.ratios import Ratio, percent
from rlhfreports.styles import INK, MARKERS, STYLE, draw_head, method_styles, plain_labels, tidy, write_figure
from rlhfreports.tables import ABSENT, GIB, ReportTable, decimals_for, number_text, outcome_word, text
from rlhfreports.ticks import log_ticks

SCALING = (
    "Weak scaling: the batch of one rank is the same at every world size; strong: the batch over all ranks. Speed-up: "
    "samples per second relative to the smallest world of the line, in parentheses its 95 % interval; efficiency: "
    "that, per rank."
)
OF_RANKS = (
    "Memory is that of the rank with the most; waiting is the share of a step that ranks wait for each other in "
    "collectives, their mean; imbalance is the busiest rank's time without waiting over the mean, minus 1."
)
PLANNED = (
    "A plan is made without running, for any number of ranks. Measured is the rank that holds most; where no case ran, "
    "the plan stands alone."
)
_MIB = 2**20
_AXIS_HEADINGS = {"prompt_len": "prompt", "completion_len": "completion", "lora_rank": "LoRA rank"}
_SPEED_UP = ("speed_up", "speed_up_low", "speed_up_high")
_MAX_ROWS = 8  # of panels in the picture; the page has all lines
_PANEL_IN, _HEAD_IN = 3.7, 1.0
# The panels of a row: label, column, factor, and whether the axis is logarithmic.
_PANELS = (
    ("seconds per sample", "total_s_per_sample", 1.0, True),
    ("GiB of the worst rank", "total_bytes", 1 / GIB, False),
    ("waiting, % of a step", "waiting_share", 100.0, False),
)


def ranks_table(frame: pd.DataFrame) -> ReportTable:
    """The cases over ranks beside each other: by method, size and world, then by strategy."""
    rows = ranked(frame)
    # A rank more or a strategy more stands in the next row.
    keys = ["method_order", "method", "seq_len", "batch_size", "world_size"]
    rows = rows.sort_values(keys, kind="stable", na_position="last", ignore_index=True)
    parts = [part for part in parts_of(frame) if rows[f"{part}_part_bytes"].fillna(0).any()]
    gib = {f"{part.replace('_', ' ')} GiB": f"{part}_part_bytes" for part in parts} | {"total GiB": "total_bytes"}
    decimals = decimals_for((rows["total_bytes"].dropna() / GIB).tolist(), 2, 3)
    cells = _names(rows) | {heading: _numbers(rows[column] / GIB, decimals) for heading, column in gib.items()}
    failed = zip(cells["total GiB"], rows["outcome"], strict=True)
    cells["total GiB"] = [cell if outcome == "ok" else outcome_word(outcome) for cell, outcome in failed]
    return ReportTable(
        caption="Cases over ranks",
        cells=pd.DataFrame(cells | _times(rows), dtype="object"),
        num_text_columns=2 + len(_axes(rows)),
        explanation=OF_RANKS,
        frame=_full(rows, [*gib.values(), "outcome", "error"]),
    )


def scaling_table(frame: pd.DataFrame) -> ReportTable:
    """The lines of ``scaling_points``: one row for each world size of each."""
    points = scaling_points(frame)
    if points.empty:
        points = points.reindex(columns=[*ranked(frame).columns, *points.columns, *_SPEED_UP, "efficiency"])
    cells = _names(points)
    cells = {"scaling": points["scaling"].tolist(), **cells}
    gained = {
        "speed-up": [str(_speed_up(row)) for row in points[[*_SPEED_UP]].to_dict("records")],
        "efficiency": [_share(value) for value in points["efficiency"]],
        "GiB of the worst rank": _numbers(points["total_bytes"] / GIB, 3),
    }
    return ReportTable(
        caption="Scaling over ranks",
        cells=pd.DataFrame(cells | gained | _times(points), dtype="object"),
        num_text_columns=3 + len(_axes(points)),
        explanation=f"{SCALING} {OF_RANKS}",
        frame=_full(points, ["scaling", *_SPEED_UP, "efficiency", "total_bytes"]),
    )


def planned_table(frame: pd.DataFrame, plans: pd.DataFrame) -> ReportTable:
    """Planned memory of a rank beside the measured one; arguments as ``planned_cases``."""
    rows = planned_cases(frame, plans)
    keys = ["method_order", "method", "seq_len", "batch_size", "world_size"]
    rows = rows.sort_values(keys, kind="stable", na_position="last", ignore_index=True)
    gib = {"planned GiB": rows["planned_bytes"] / GIB, "measured GiB": rows["measured_bytes"] / GIB}
    decimals = decimals_for([float(value) for values in gib.values() for value in values.dropna()], 2, 3)
    cells = _names(rows) | {heading: _numbers(values, decimals) for heading, values in gib.items()}
    cells["plan off by, %"] = [ABSENT if pd.isna(value) else f"{value:+.2f}" for value in rows["error_percent"]]
    return ReportTable(
        caption="Memory of a rank, planned and measured",
        cells=pd.DataFrame(cells, dtype="object"),
        num_text_columns=2 + len(_axes(rows)),
        explanation=PLANNED,
        frame=_full(rows, ["planned_bytes", "measured_bytes", "error_percent"]),
    )


def _axes(rows: pd.DataFrame) -> list[str]:
    """The columns that tell apart rows of one method, strategy, size and world: split lengths, and axes that vary."""
    splits = ["prompt_len", "completion_len"] if has_splits(rows) else []
    return [*splits, *(axis for axis in axes_that_vary(rows) if axis not in IN_A_LINE)]


def _names(rows: pd.DataFrame) -> dict[str, list[str]]:
    axes = _axes(rows)
    columns = {
        "method": "title",
        "ranks share by": "label",
        **{_AXIS_HEADINGS.get(axis, axis): axis for axis in axes},
        "tokens": "seq_len",
        "batch of a rank": "batch_size",
        "ranks": "world_size",
    }
    rows = with_short_options(rows) if axes else rows
    return {heading: [text(value) for value in rows[column]] for heading, column in columns.items()}


def _times(rows: pd.DataFrame) -> dict[str, list[str]]:
    seconds, widths = rows["total_s_per_sample"], rows["total_half_width_s_per_sample"]
    return {
        "s/sample": interval_texts(seconds, seconds, widths),
        "± s": interval_texts(widths, seconds, widths),
        "waiting": [_share(value) for value in rows["waiting_share"]],
        "imbalance": [_share(value) for value in rows["imbalance"]],
        "MiB in collectives": _numbers(rows["communication_bytes"] / _MIB, 2),
        "collectives": [text(value) for value in rows["communication_calls"]],
    }


def _full(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The rows at full precision, as files have them."""
    shared = ("method", "title", "label", "seq_len", "batch_size", "global_batch_size", "world_size", "worst_rank")
    times = ("total_s_per_sample", "waiting_share", "imbalance", "communication_bytes", "communication_calls")
    return rows[[*shared, *_axes(rows), *columns, *times]].rename(
        columns={"title": "method_title", "label": "strategy"}
    )


def _speed_up(row: Mapping[Hashable, Any]) -> Ratio:
    value, *ends = (row[name] for name in _SPEED_UP)
    return Ratio(float(value), *(None if pd.isna(end) else float(end) for end in ends))


def _numbers(values: pd.Series[Any], decimals: int) -> list[str]:
    return [ABSENT if pd.isna(value) else number_text(float(value), decimals) for value in values]


def _share(value: Any) -> str:
    return ABSENT if pd.isna(value) else percent(float(value))


def draw_scaling(frame: pd.DataFrame, path_stem: str | Path) -> tuple[Path, Path]:
    """Writes ``scaling_figure`` as ``path_stem``.png and .svg, and returns both paths."""
    return write_figure(scaling_figure(frame), path_stem)


def scaling_figure(frame: pd.DataFrame) -> Figure:
    """Against the number of ranks: seconds per sample, GiB of the worst rank, share of waiting; a row of panels a size.

    A line is a method and a strategy: its colour is the method's, its marker the strategy's. Efficient strong and weak
    scaling both look like a line that falls with the ranks. Of more than eight sizes eight are drawn, and the picture
    says so.
    """
    points = scaling_points(frame)
    every = list(dict.fromkeys(points["at"]))
    sizes = every[:_MAX_ROWS]
    left_out = "" if len(sizes) == len(every) else f"{len(sizes)} of {len(every)} sizes: the page has all"
    colors = {method: style.color for method, style in method_styles(frame).items()}
    with matplotlib.rc_context(STYLE):
        width, height = _PANEL_IN * len(_PANELS) + 0.4, _PANEL_IN * len(sizes) + _HEAD_IN
        figure = Figure(figsize=(width, height))
        for row, at in enumerate(sizes):
            lines = [line for _, line in points[points["at"] == at].groupby("line", sort=False)]
            bottom = (0.6 + _PANEL_IN * (len(sizes) - 1 - row)) / height
            for i, (label, column, factor, is_log) in enumerate(_PANELS):
                left, side = (0.75 + i * _PANEL_IN) / width, (_PANEL_IN - 0.85) / width
                axes = figure.add_axes((left, bottom, side, (_PANEL_IN - 1.15) / height))
                _draw_panel(axes, lines, column, factor, colors, is_log=is_log)
                axes.set_xlabel("ranks")
                axes.set_title(label if i else f"{at}\n{label}", fontsize=10.5)
        _draw_heads(figure, frame, points, left_out)
    return figure


def _marker(strategy: str) -> str:
    return MARKERS[strategy_place(strategy) % len(MARKERS)]


def _draw_heads(figure: Figure, frame: pd.DataFrame, points: pd.DataFrame, note: str) -> None:
    shown = set(points["method"])
    styles = [
        dataclasses.replace(style, marker="") for method, style in method_styles(frame).items() if method in shown
    ]
    strategies = sorted(dict.fromkeys(points["strategy"]), key=strategy_place)
    handles = [Line2D([], [], color=INK, linestyle="none", marker=_marker(name), label=name) for name in strategies]
    draw_head(figure, frame, "Scaling over ranks", styles, handles, note=note)


def _draw_panel(
    axes: Axes,
    lines: Sequence[pd.DataFrame],
    column: str,
    factor: float,
    colors: Mapping[str, str],
    *,
    is_log: bool,
) -> None:
    worlds = sorted({int(size) for line in lines for size in line["world_size"]})
    axes.set_xscale("log")
    if is_log:
        axes.set_yscale("log")
    for line in lines:
        rows = line[line[column].notna()]
        axes.plot(
            rows["world_size"].astype("float64").tolist(),
            (rows[column].astype("float64") * factor).tolist(),
            color=colors[line["method"].iloc[0]],
            marker=_marker(line["strategy"].iloc[0]),
            markersize=6,
            linewidth=1.6,
        )
    if is_log:
        plain_labels(axes.yaxis, log_ticks(*axes.get_ylim()))
    else:
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    plain_labels(axes.xaxis, worlds)
    tidy(axes, label_size=9)
