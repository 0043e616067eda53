"""Predicted memory against measured as a picture: a log-log plot with the diagonal."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhfreports.frames import predicted
from rlhfreports.predicted import SUMS, comparisons, worst_sentence
from rlhfreports.styles import STYLE, Style, draw_head, method_styles, plain_labels, tidy, write_figure
from rlhfreports.ticks import log_ticks

_PANEL_IN = 3.6


def draw_predicted(frame: pd.DataFrame, path_stem: Path) -> tuple[Path, Path]:
    """Writes ``predicted_figure`` as ``path_stem``.png and .svg, and returns both paths."""
    return write_figure(predicted_figure(frame), path_stem)


def predicted_figure(frame: pd.DataFrame) -> Figure:
    """Measured against predicted GiB: one panel per sum, one marker per method, and the diagonal of equality."""
    found = predicted(frame)
    styles = method_styles(frame)
    with matplotlib.rc_context(STYLE):
        width, height = _PANEL_IN * len(SUMS) + 0.4, _PANEL_IN + 1.5
        figure = Figure(figsize=(width, height))
        for i, kind in enumerate(SUMS):
            left, side = (0.75 + i * _PANEL_IN) / width, (_PANEL_IN - 0.75) / width
            axes = figure.add_axes((left, 0.85 / height, side, (_PANEL_IN - 0.75) / height))
            _draw_panel(axes, found[found["kind"] == kind], styles)
            axes.set_title(f"{kind} memory", fontsize=10.5)
            axes.set_xlabel("predicted GiB")
            if i == 0:
                axes.set_ylabel("measured GiB")
        figure.text(0.5, 0.12 / height, worst_sentence(comparisons(frame)), ha="center", va="bottom", fontsize=9.5)
        draw_head(figure, frame, "Measured memory against predicted", list(styles.values()))
    return figure


def _draw_panel(axes: Axes, found: pd.DataFrame, styles: dict[str, Style]) -> None:
    sizes = [float(size) for name in ("predicted_gib", "measured_gib") for size in found[name]]
    low, high = (min(sizes), max(sizes)) if sizes else (1.0, 1.0)
    margin = max(0.08 * math.log10(high / low), 0.15)
    limits = low / 10**margin, high * 10**margin
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*limits)
    axes.set_ylim(*limits)
    ticks = log_ticks(*limits)
    for axis in (axes.xaxis, axes.yaxis):
        plain_labels(axis, ticks[:: 1 + len(ticks) // 5])
    axes.plot(limits, limits, color="#999999", linewidth=1.0, linestyle="--", label="_diagonal", zorder=1)
    for method, style in styles.items():
        points = found[found["method"] == method]
        if len(points):
            axes.plot(
                points["predicted_gib"].tolist(),
                points["measured_gib"].tolist(),
                color=style.color,
                marker=style.marker,
                markersize=7,
                markeredgecolor="white",
                markeredgewidth=0.8,
                linestyle="none",
                label=style.title,
            )
    tidy(axes, label_size=9)
