"""Scaling over ranks: seconds per sample, memory of the worst rank and share of waiting against the world size.

Rows that differ in nothing but their ranks make a line: with the same batch size of one rank (weak scaling), or with
the same batch size over all ranks (strong scaling). The frame has the columns of ``rlhfreports.columns``, and of ranks
``world_size``, ``parallel``, ``zero_stage``, ``global_batch_size``, ``worst_rank``, ``waiting_share``, ``imbalance``
and ``communication_bytes``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from rlhfreports.columns import axes_of, is_measured
from rlhfreports.plots import STYLE, LineStyle, Style, draw_head, method_styles, write_figure
from rlhfreports.tables import ABSENT, GIB, ReportTable, decimals_for, number_text, text
from rlhfreports.ticks import plain_number

KINDS = {"weak": "batch_size", "strong": "global_batch_size"}  # by the batch size that is the same at every point
_NAMES = {"ddp": "DDP", "fsdp": "FSDP", "deepspeed": "ZeRO"}
_SHARED = ("method", "prompt_len", "completion_len")
_PREFIX = "parallel."
_OF_RANKS = (f"{_PREFIX}strategy=", f"{_PREFIX}world_size=", f"{_PREFIX}zero_stage=")
_TITLE = "Scaling over ranks"
_EXPLANATION = (
    "Weak scaling: the batch of one rank is the same at every world size; strong: the batch over all ranks. Speed-up: "
    "samples per second relative to the smallest world of the line; efficiency: that, per rank. Memory is that of the "
    "rank with the most; waiting is the share of a step that ranks wait for each other in collectives, their mean; "
    "imbalance is the busiest rank's time without waiting over the mean, minus 1."
)
_COLUMNS = {
    "method_title": "method",
    "strategy": "ranks share by",
    "scaling": "scaling",
    "seq_len": "tokens",
    "batch_size": "batch of a rank",
    "world_size": "ranks",
    "total_s_per_sample": "s/sample",
    "speed_up": "speed-up",
    "efficiency": "efficiency",
    "total_bytes": "GiB of the worst rank",
    "waiting_share": "waiting",
    "imbalance": "imbalance",
    "communication_bytes": "MiB in collectives",
}
_NUM_TEXT_COLUMNS = 3
_DASHES: tuple[LineStyle, ...] = ("-", "--", "-.", ":")
_PANEL_IN = 3.7


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScalingLine:
    """The points of one line.

    Attributes:
        method: name of the method.
        strategy: how its ranks share a step, in words: ``ZeRO-2``.
        kind: ``weak`` or ``strong``.
        rows: of the frame, by world size, two or more.
    """

    method: str
    strategy: str
    kind: str
    rows: pd.DataFrame


def has_scaling(frame: pd.DataFrame) -> bool:
    """True if some cases of ``frame`` differ in their number of ranks alone."""
    return any(True for _ in scaling_lines(frame))


def scaling_lines(frame: pd.DataFrame) -> Iterator[ScalingLine]:
    """The lines of ``frame``, weak ones first."""
    if "world_size" not in frame or frame["parallel"].isna().all():
        return
    rows = frame[is_measured(frame) & frame["parallel"].notna()]
    rows = rows.assign(strategy=[strategy_words(row) for row in rows.to_dict("records")], rest=_other_options(rows))
    # The setting follows from the options, which name the ranks.
    axes = [axis for axis in axes_of(frame) if axis not in ("setting", "options")]
    for kind, batch in KINDS.items():
        for _, found in rows.groupby([*_SHARED, *axes, "strategy", "rest", batch], sort=False, dropna=False):
            points = found.drop_duplicates("world_size", keep="last").sort_values("world_size", kind="stable")
            if len(points) > 1:
                first = points.iloc[0]
                yield ScalingLine(method=first["method"], strategy=first["strategy"], kind=kind, rows=points)


def strategy_words(row: Mapping[Any, Any]) -> str:
    """How the ranks of a row share a step, in words: ``DDP``, ``FSDP``, ``ZeRO-2``."""
    name = _NAMES.get(str(row["parallel"]), str(row["parallel"]))
    return name if pd.isna(row["zero_stage"]) else f"{name}-{row['zero_stage']}"


def _other_options(rows: pd.DataFrame) -> list[str]:
    """The options of each row without those that every point of a line differs in."""
    return [
        ", ".join(word for word in str(options).split(", ") if not word.startswith(_OF_RANKS))
        for options in rows["options"].fillna("")
    ]


def scaling_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """Every point of every line, at full precision, with ``scaling``, ``speed_up`` and ``efficiency``."""
    found = []
    for line in scaling_lines(frame):
        seconds = line.rows["total_s_per_sample"].astype("float64")
        ranks = line.rows["world_size"].astype("float64")
        speed_up = seconds.iloc[0] / seconds
        efficiency = speed_up * ranks.iloc[0] / ranks
        found.append(line.rows.assign(scaling=line.kind, speed_up=speed_up, efficiency=efficiency))
    names = ["method", "global_batch_size", "worst_rank", *_COLUMNS]
    return pd.concat(found, ignore_index=True)[names] if found else pd.DataFrame(columns=names)


def scaling_table(frame: pd.DataFrame) -> ReportTable:
    """The table of the lines: one row for each world size of each."""
    points = scaling_frame(frame)
    decimals = decimals_for([float(seconds) for seconds in points["total_s_per_sample"]], 3, 6)
    cells = [
        [
            text(row["method_title"]),
            row["strategy"],
            row["scaling"],
            text(row["seq_len"]),
            text(row["batch_size"]),
            text(row["world_size"]),
            number_text(float(row["total_s_per_sample"]), decimals),
            f"{row['speed_up']:.2f}x",
            f"{row['efficiency']:.0%}",
            ABSENT if pd.isna(row["total_bytes"]) else number_text(row["total_bytes"] / GIB, 3),
            _share(row["waiting_share"]),
            _share(row["imbalance"]),
            ABSENT if pd.isna(row["communication_bytes"]) else number_text(row["communication_bytes"] / 2**20, 2),
        ]
        for row in points.to_dict("records")
    ]
    return ReportTable(
        caption=_TITLE,
        cells=pd.DataFrame(cells, columns=list(_COLUMNS.values()), dtype="object"),
        num_text_columns=_NUM_TEXT_COLUMNS,
        explanation=_EXPLANATION,
        frame=points,
    )


def _share(value: Any) -> str:
    return ABSENT if pd.isna(value) else f"{value:.0%}"


def draw_scaling(frame: pd.DataFrame, path_stem: str | Path) -> tuple[Path, Path]:
    """Writes ``scaling_figure`` as ``path_stem``.png and .svg, and returns both paths."""
    return write_figure(scaling_figure(frame), path_stem)


def scaling_figure(frame: pd.DataFrame) -> Figure:
    """Three panels against the number of ranks: seconds per sample, GiB of the worst rank, share of waiting.

    A line is a method and a strategy at one size: colour and marker are the method's, the dashes the strategy's.
    Efficient strong and weak scaling both look like a line that falls with the ranks.
    """
    lines = list(scaling_lines(frame))
    styles = method_styles(frame)
    strategies = list(dict.fromkeys(line.strategy for line in lines))
    dashes = {name: _DASHES[i % len(_DASHES)] for i, name in enumerate(strategies)}
    panels = (
        ("seconds per sample", "total_s_per_sample", 1.0, True),
        ("GiB of the worst rank", "total_bytes", 1 / GIB, False),
        ("waiting, % of a step", "waiting_share", 100.0, False),
    )
    with matplotlib.rc_context(STYLE):
        width, height = _PANEL_IN * len(panels) + 0.4, _PANEL_IN + 1.2
        figure = Figure(figsize=(width, height))
        for i, (label, column, factor, is_log) in enumerate(panels):
            left, side = (0.75 + i * _PANEL_IN) / width, (_PANEL_IN - 0.85) / width
            axes = figure.add_axes((left, 0.6 / height, side, (_PANEL_IN - 0.75) / height))
            _draw_panel(axes, lines, column, factor, styles, dashes, is_log=is_log)
            axes.set_xlabel("ranks")
            axes.set_title(label, fontsize=10.5)
        shown = {line.method for line in lines}
        heads = [style for method, style in styles.items() if method in shown]
        draw_head(figure, frame, _TITLE, heads, dashes)
    return figure


def _draw_panel(
    axes: Axes,
    lines: Sequence[ScalingLine],
    column: str,
    factor: float,
    styles: Mapping[str, Style],
    dashes: Mapping[str, LineStyle],
    *,
    is_log: bool,
) -> None:
    sizes = sorted({int(size) for line in lines for size in line.rows["world_size"]})
    axes.set_xscale("log")
    if is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: plain_number(value)))
    for line in lines:
        rows = line.rows[line.rows[column].notna()]
        axes.plot(
            rows["world_size"].astype("float64").tolist(),
            (rows[column].astype("float64") * factor).tolist(),
            color=styles[line.method].color,
            marker=styles[line.method].marker,
            linestyle=dashes[line.strategy],
            markersize=6,
            linewidth=1.6,
            alpha=1.0 if line.kind == "weak" else 0.6,
        )
    if not is_log:
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(visible=True, color="#E4E4E4", linewidth=0.8)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
