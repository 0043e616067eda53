"""The look of static pictures: colours, markers and line styles of methods and settings, legends, axes, files."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from rlhfreports.columns import axes_that_vary, methods_in_order, setting_order, shared_axes_text
from rlhfreports.ticks import plain_number

# Okabe and Ito's palette without its yellow, then five colours that are as far from these and each other under every
# colour blindness as Okabe and Ito's own are (0.076 in OKLab; their yellow-brown was 0.005 from the vermilion).
COLORS = (
    *("#000000", "#D55E00", "#E69F00", "#009E73", "#0072B2", "#CC79A7", "#56B4E9"),
    *("#660022", "#000099", "#77EE99", "#AA33FF", "#555500"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
LineStyle = Literal["-", "--", "-.", ":"]
LINE_STYLES: tuple[LineStyle, ...] = ("-", "--", "-.", ":")  # of settings
INK = "#333333"
LEGEND_ROW_IN = 0.23
_LEGEND_CHAR_IN, _LEGEND_HANDLE_IN = 0.083, 0.6
# From matplotlib's defaults, so that a user's own settings do not change the pictures.
STYLE: dict[Any, Any] = {
    **{name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")},
    "svg.hashsalt": "rlhfbench",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """Colour, marker and line style of a line, the same in every panel of every figure."""

    title: str
    color: str
    marker: str
    line: LineStyle = "-"


def method_styles(frame: pd.DataFrame) -> dict[str, Style]:
    """Colour and marker by ``method_order``, so that a method looks the same in every run.

    Methods without an order get what is left. No two of 144 look the same.
    """
    methods = methods_in_order(frame)
    taken = set(methods["method_order"].dropna())
    free = (slot for slot in itertools.count() if slot not in taken)
    styles = {}
    for row in methods.to_dict("records"):
        slot = next(free) if pd.isna(row["method_order"]) else int(row["method_order"])
        styles[row["method"]] = Style(
            title=row["method_title"],
            color=COLORS[slot % len(COLORS)],
            marker=MARKERS[(slot + slot // len(COLORS)) % len(MARKERS)],
        )
    return styles


def setting_styles(frame: pd.DataFrame) -> dict[str, LineStyle]:
    """The line style of each setting by ``setting_order``, the last one for custom; empty where no setting varies."""
    if "setting" not in axes_that_vary(frame):
        return {}
    orders = frame.drop_duplicates("setting").set_index("setting")["setting_order"]
    last = len(LINE_STYLES) - 1
    places = {name: last if pd.isna(orders[name]) else min(int(orders[name]), last) for name in setting_order(frame)}
    return {name: LINE_STYLES[place] for name, place in places.items()}


def line_styles(frame: pd.DataFrame) -> dict[str, Style]:
    """The style of each line (``frames.line_of``): colour and marker of its method, line style of its setting."""
    lines = setting_styles(frame)
    styles = {}
    for style in method_styles(frame).values():
        for setting in setting_order(frame):
            title = f"{style.title}, {setting}" if lines else style.title
            line = lines.get(setting, LINE_STYLES[0])
            styles[title] = dataclasses.replace(style, title=title, line=line)
    return styles


def draw_head(
    figure: Figure,
    frame: pd.DataFrame,
    title: str,
    styles: Sequence[Style],
    more: Sequence[Line2D] = (),
    *,
    note: str = "",
) -> None:
    """Draws the title, the axes that all points share and ``note``, and a legend of ``styles`` and ``more``."""
    width, height = figure.get_size_inches()
    figure.text(0.5, 1 - 0.12 / height, title, ha="center", va="top", fontsize=14, fontweight="bold")
    words = " · ".join(filter(None, [shared_axes_text(frame), note]))
    figure.text(0.5, 1 - 0.42 / height, words, ha="center", va="top", fontsize=10, color="#666666")
    handles = [
        Line2D([], [], color=style.color, marker=style.marker, markersize=6, linewidth=1.8, label=style.title)
        for style in styles
    ] + list(more)
    figure.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - 0.62 / height),
        ncols=math.ceil(len(handles) / num_legend_rows([str(handle.get_label()) for handle in handles], width)),
        frameon=False,
        columnspacing=1.6,
        handlelength=2.0,
    )


def num_legend_rows(labels: Sequence[str], width_in: float) -> int:
    """Rows that a legend of ``labels`` needs in a figure of this width."""
    needed_in = sum(len(label) * _LEGEND_CHAR_IN + _LEGEND_HANDLE_IN for label in labels)
    return max(1, math.ceil(needed_in / width_in))


def plain_labels(axis: Axis, ticks: Sequence[float] | None = None) -> None:
    """Labels a logarithmic axis with plain numbers, at ``ticks`` where they are given."""
    if ticks is not None:
        axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
    axis.set_minor_locator(NullLocator())


def tidy(axes: Axes, label_size: float = STYLE["font.size"]) -> None:
    """Draws a faint grid, and no tick marks, top or right side."""
    axes.grid(visible=True, color="#E4E4E4", linewidth=0.8)
    axes.tick_params(length=0, labelsize=label_size)
    axes.spines[["top", "right"]].set_visible(False)


def write_figure(figure: Figure, path_stem: str | Path) -> tuple[Path, Path]:
    """Writes ``figure`` as ``path_stem``.png and .svg, and returns both paths."""
    path_stem = Path(path_stem)
    png, svg = path_stem.with_name(f"{path_stem.name}.png"), path_stem.with_name(f"{path_stem.name}.svg")
    with matplotlib.rc_context(STYLE):
        if figure.get_layout_engine() is not None:
            # Laid out once: each file would do it twice again, a third of the time of a figure of 11 panels.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        figure.savefig(png, dpi=150, metadata={"Software": None})
        figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return png, svg
