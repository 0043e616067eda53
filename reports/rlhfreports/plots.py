"""Log-log plots against sequence length, one line per method and setting: seconds per sample, and throughput.

Drawn with matplotlib's object interface: no display, no global figure. The files depend on the frame alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator
from matplotlib.transforms import blended_transform_factory

from rlhfreports.columns import shared_axes_text
from rlhfreports.frames import failures, panel_titles, times
from rlhfreports.styles import (
    INK,
    LEGEND_ROW_IN,
    LINE_STYLES,
    STYLE,
    Style,
    draw_head,
    line_styles,
    method_styles,
    num_legend_rows,
    plain_labels,
    setting_styles,
    tidy,
    write_figure,
)
from rlhfreports.tables import outcome_word
from rlhfreports.ticks import log_ticks, spaced

_BAND = "#F5F2EC"
_BAND_ALPHA = 0.2
_MAX_COLUMNS = 3
_MAX_PANELS = 9  # a picture of 67 panels took half of a report of 1,000 records, and nobody can read it
_WORD_ROW, _MAX_BAND = 0.055, 0.5  # shares of a panel's height
_PANEL_WIDTH_IN, _PANEL_HEIGHT_IN = 4.4, 3.7


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Quantity:
    """The y axis of a row of panels: its label, and the values for seconds and tokens of a sample."""

    label: str
    values: Callable[[pd.Series[float], pd.Series[float]], pd.Series[float]]


_SECONDS = _Quantity(label="seconds per sample (lower is better)", values=lambda seconds, tokens: seconds)
_SAMPLES = _Quantity(label="samples per second (higher is better)", values=lambda seconds, tokens: 1 / seconds)
_TOKENS = _Quantity(label="tokens per second, prompt + completion", values=lambda seconds, tokens: tokens / seconds)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Panel:
    """One panel: its title, the rows of ``frames.times`` and those of ``frames.failures``."""

    title: str
    points: pd.DataFrame
    failures: pd.DataFrame


def _panels(frame: pd.DataFrame) -> list[_Panel]:
    points, failed = times(frame), failures(frame)
    points = points[points["kind"] == "total"]
    return [
        _Panel(title=title, points=points[points["panel"] == title], failures=failed[failed["panel"] == title])
        for title in panel_titles(frame)
    ]


def _drawn(panels: Sequence[_Panel]) -> list[_Panel]:
    """Those that a picture has room for: the first with points, the last, and others evenly between them."""
    if len(panels) <= _MAX_PANELS:
        return list(panels)
    panels = [panel for panel in panels if len(panel.points)]
    places = np.linspace(0, len(panels) - 1, min(_MAX_PANELS, len(panels))).round().astype(int)
    return [panels[place] for place in places]


def latency(frame: pd.DataFrame, path_stem: str | Path) -> tuple[Path, Path]:
    """Writes ``latency_figure`` as ``path_stem``.png and .svg, and returns both paths."""
    return write_figure(latency_figure(frame), path_stem)


def throughput(frame: pd.DataFrame, path_stem: str | Path) -> tuple[Path, Path]:
    """Writes ``throughput_figure`` as ``path_stem``.png and .svg, and returns both paths."""
    return write_figure(throughput_figure(frame), path_stem)


def latency_figure(frame: pd.DataFrame) -> Figure:
    """Seconds per sample (lower is better) against sequence length: one panel per batch size, one line per method.

    Of more than nine panels nine are drawn, and the picture says so.

    Args:
        frame: a frame of ``rlhfbench.records_frame``; see ``rlhfreports.columns``.
    """
    return _figure(frame, "Seconds per sample against sequence length", [_SECONDS])


def throughput_figure(frame: pd.DataFrame) -> Figure:
    """Samples and tokens per second (higher is better) against sequence length: one row of panels each.

    Args:
        frame: a frame of ``rlhfbench.records_frame``; see ``rlhfreports.columns``.
    """
    return _figure(frame, "Throughput against sequence length", [_SAMPLES, _TOKENS])


def _figure(frame: pd.DataFrame, title: str, quantities: Sequence[_Quantity]) -> Figure:
    every = _panels(frame)
    panels = _drawn(every)
    left_out = "" if len(panels) == len(every) else f"{len(panels)} of {len(every)} panels: the page has all"
    with matplotlib.rc_context(STYLE):
        if not any(len(panel.points) for panel in panels):
            return _empty_figure(frame, title)
        num_rows, num_columns = _shape(len(panels), len(quantities))
        width = max(_PANEL_WIDTH_IN * num_columns + 0.6, 7.4)
        methods, settings = list(method_styles(frame).values()), setting_styles(frame)
        legend_rows = num_legend_rows([*(style.title for style in methods), *settings], width)
        head = 1 + LEGEND_ROW_IN * (legend_rows - 1)  # inches for title and legend
        height = _PANEL_HEIGHT_IN * num_rows + head + 0.15
        layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - head / height), w_pad=0.08, h_pad=0.08)
        figure = Figure(figsize=(width, height), layout=layout)
        grid = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
        share = len(grid) // len(quantities)
        styles = line_styles(frame)
        for i, quantity in enumerate(quantities):
            _draw_quantity(grid[i * share : (i + 1) * share], panels, quantity, styles, num_columns)
        lines = [
            Line2D([], [], color=INK, linestyle=line, linewidth=1.8, label=setting)
            for setting, line in settings.items()
        ]
        draw_head(figure, frame, title, methods, lines, note=left_out)
    return figure


def _shape(num_panels: int, num_quantities: int) -> tuple[int, int]:
    """Rows and columns of the grid: each quantity has its own rows, or its own column when there is one panel."""
    if num_panels == 1:
        return 1, num_quantities
    num_columns = 2 if num_panels == 4 else min(num_panels, _MAX_COLUMNS)
    return math.ceil(num_panels / num_columns) * num_quantities, num_columns


def _draw_quantity(
    grid: Sequence[Axes], panels: Sequence[_Panel], quantity: _Quantity, styles: dict[str, Style], num_columns: int
) -> None:
    """Draws one quantity into its panels, all with the same limits."""
    lengths = sorted({int(x) for panel in panels for rows in (panel.points, panel.failures) for x in rows["seq_len"]})
    values = [y for panel in panels for ends in _band(panel.points, quantity) for y in ends]
    close = len(spaced(lengths, lengths[-1] / lengths[0])) < len(lengths)
    words = [_words(panel, styles, short=close) for panel in panels]
    bottom, top, band = _limits(values, max(map(len, words)))
    for i, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
        _scale(axes, lengths, bottom, top)
        axes.set_title(panel.title, fontsize=10.5, color=INK)
        if i % num_columns == 0 or len(panels) == 1:
            axes.set_ylabel(quantity.label)
        else:
            axes.tick_params(labelleft=False)
        axes.set_xlabel("sequence length (tokens)")
        axes.yaxis.set_major_locator(FixedLocator(log_ticks(bottom, bottom * (top / bottom) ** (1 - band))))
        _draw_lines(axes, panel, quantity, styles)
        _draw_words(axes, words[i], styles)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)


def _draw_lines(axes: Axes, panel: _Panel, quantity: _Quantity, styles: dict[str, Style]) -> None:
    for line, style in styles.items():
        rows = _rows_of(line, panel.points).sort_values("seq_len", kind="stable")
        if rows.empty:
            continue
        x, y = rows["seq_len"].astype("float64").tolist(), quantity.values(rows["seconds"], rows["tokens"]).tolist()
        axes.plot(
            x,
            y,
            color=style.color,
            marker=style.marker,
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=0.8,
            linewidth=1.8,
            linestyle=style.line,
            label=style.title,
        )
        low, high = _band(rows, quantity)
        axes.fill_between(x, low, high, color=style.color, alpha=_BAND_ALPHA, linewidth=0)
        # A line of one point has no area.
        axes.vlines(x, low, high, color=style.color, linewidth=1.2)


def _band(rows: pd.DataFrame, quantity: _Quantity) -> tuple[list[float], list[float]]:
    """The ends of the 95 % interval of each point; both are the point itself where there is none."""
    one, other = (quantity.values(rows[end], rows["tokens"]).to_numpy(dtype=float) for end in ("low", "high"))
    return np.minimum(one, other).tolist(), np.maximum(one, other).tolist()


def _rows_of(line: str, rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["line"] == line]


def _words(panel: _Panel, styles: dict[str, Style], *, short: bool) -> dict[str, list[tuple[int, str]]]:
    """The words of the band above the lines, by line: (length, outcome) for each case that was not measured.

    A panel whose points differ in batch size has the batch size of each point there too. ``short`` words are for
    lengths so close that longer ones would overlap.
    """
    words: dict[str, list[tuple[int, str]]] = {}
    for line in styles:
        failures = _rows_of(line, panel.failures)
        found = [
            (length, "×" if short else outcome_word(outcome) if outcome != "ok" else "no time")
            for length, outcome in zip(failures["seq_len"].tolist(), failures["outcome"].tolist(), strict=True)
        ]
        points = _rows_of(line, panel.points)
        points = points[points["shows_batch"].astype(bool)]
        if len(points):
            sizes = zip(points["seq_len"].tolist(), points["batch_size"].tolist(), strict=True)
            found += [(length, f"{size}" if short else f"batch {size}") for length, size in sizes]
        if found:
            words[line] = found
    return words


def _draw_words(axes: Axes, words: dict[str, list[tuple[int, str]]], styles: dict[str, Style]) -> None:
    """Draws the band at the top of a panel: one row per line, in its colour, after its marker and line style."""
    if not words:
        return
    row = _word_row(len(words))
    band = row * len(words)
    axes.add_patch(
        Rectangle((0, 1 - band), 1, band, transform=axes.transAxes, facecolor=_BAND, edgecolor="none", zorder=0.5)
    )
    at = blended_transform_factory(axes.transData, axes.transAxes)
    for i, (line, found) in enumerate(words.items()):
        y, style = 1 - row * (i + 0.5), styles[line]
        axes.plot([0.02], [y], transform=axes.transAxes, marker=style.marker, markersize=5, color=style.color, lw=0)
        if style.line != LINE_STYLES[0]:
            ends = [0.0, 0.04]
            axes.plot(ends, [y, y], transform=axes.transAxes, color=style.color, linestyle=style.line, linewidth=1.2)
        words_at: dict[str, Any] = {"transform": at, "ha": "center", "va": "center_baseline", "color": style.color}
        for length, word in found:
            axes.text(length, y, word, fontsize=7.5 * row / _WORD_ROW, **words_at)


def _word_row(num_rows: int) -> float:
    """Height of a row of the band, as a share of the panel's."""
    return min(_WORD_ROW, _MAX_BAND / max(num_rows, 1))


def _limits(values: Sequence[float], num_word_rows: int) -> tuple[float, float, float]:
    """Limits of the y axis, and the share of its height at the top that the band takes."""
    low, high = math.log10(min(values)), math.log10(max(values))
    # At least half a decade, so that noise in a flat line does not look like a slope.
    margin = max(0.06 * (high - low), (0.5 - (high - low)) / 2)
    low, high = low - margin, high + margin
    band = 0.0 if num_word_rows == 0 else 0.02 + _word_row(num_word_rows) * num_word_rows
    return 10**low, 10 ** (low + (high - low) / (1 - band)), band


def _scale(axes: Axes, lengths: Sequence[int], bottom: float, top: float) -> None:
    """Makes both axes logarithmic, with plain numbers as labels, on x at the measured lengths."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    span = max(lengths[-1] / lengths[0], 2.0)
    left = 0.15 if len(lengths) > 1 else 0.1  # room for the band's markers
    axes.set_xlim(lengths[0] / span**left, lengths[-1] * span**0.1)
    axes.set_ylim(bottom, top)
    plain_labels(axes.xaxis, spaced(lengths, span))
    plain_labels(axes.yaxis)
    tidy(axes)


def _empty_figure(frame: pd.DataFrame, title: str) -> Figure:
    """A figure without axes that counts the outcomes."""
    figure = Figure(figsize=(7.4, 3.2))
    figure.text(0.5, 0.93, title, ha="center", va="top", fontsize=14, fontweight="bold")
    figure.text(0.5, 0.82, shared_axes_text(frame), ha="center", va="top", fontsize=10, color="#666666")
    counts = frame["outcome"].value_counts(sort=False)
    found = ", ".join(f"{count} {outcome_word(outcome)}" for outcome, count in counts.items())
    figure.text(
        0.5, 0.45, f"No case was measured{f': {found}' if found else ''}.", ha="center", va="center", fontsize=11
    )
    return figure
