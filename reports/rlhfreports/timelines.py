"""The timeline of a step as a picture: live bytes by part over its events, phase by phase.

It takes two frames. The points, in the order of their events: ``event`` (a running count of storages made, resized,
moved between parts or freed) and ``{part}_part_bytes``, the live bytes of every part after it. The phases, in the order
in which they ran: ``phase``, ``first_event`` and ``last_event``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhfreports.columns import parts_of
from rlhfreports.plans import part_colors
from rlhfreports.styles import COLORS, STYLE, write_figure
from rlhfreports.tables import GIB

_MIN_SHARE = 0.15  # of the width, so that phases of few events can be read
_UPRIGHT_SHARE, _UNNAMED_SHARE = 0.1, 0.015  # narrower phases have an upright name, or none
_BOUNDARY = "#777777"

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


def draw_timeline(
    points: pd.DataFrame, phases: pd.DataFrame, path_stem: Path, *, title: str, caption: str
) -> tuple[Path, Path]:
    """Writes ``timeline_figure`` as ``path_stem``.png and .svg, and returns both paths."""
    return write_figure(timeline_figure(points, phases, title=title, caption=caption), path_stem)


def timeline_figure(points: pd.DataFrame, phases: pd.DataFrame, *, title: str, caption: str) -> Figure:
    """GiB as areas stacked by part, over the events of the phases, with the peak marked.

    The width of a phase grows with its events from a least share of the picture.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.5, 4.4))
        axes = figure.add_axes((0.09, 0.2, 0.87, 0.58))
        knots, places = scale(points, phases)
        inside = points[points["event"].between(int(knots[0]), int(knots[-1]))]
        x = np.interp(inside["event"].to_numpy(dtype=float), knots, places)
        parts = parts_of(points)
        sizes = [inside[f"{part}_part_bytes"].to_numpy(dtype=float) / GIB for part in parts]
        labels = [part.replace("_", " ") for part in parts]
        axes.stackplot(x, sizes, colors=part_colors(parts), labels=labels, linewidth=0)
        total: Floats = np.sum(sizes, axis=0)
        axes.set_xlim(0, float(places[-1]))
        axes.set_ylim(0, (float(total.max()) if total.size else 0.0) * 1.15 or 1.0)
        _mark_phases(axes, phases, knots, places)
        _mark_peak(axes, x, total)
        axes.set_ylabel("GiB")
        axes.set_xlabel("events: tensors made, named and freed (short phases are widened)")
        axes.spines[["top", "right"]].set_visible(False)
        figure.text(0.5, 0.975, title, ha="center", va="top", fontsize=13, fontweight="bold")
        figure.text(0.5, 0.91, caption, ha="center", va="top", fontsize=9.5, color="#666666")
        figure.legend(loc="lower center", ncols=len(parts), frameon=False, fontsize=8, handlelength=1, columnspacing=1)
    return figure


def scale(points: pd.DataFrame, phases: pd.DataFrame) -> tuple[Floats, Floats]:
    """Knots (events, x positions) of the piecewise linear x axis."""
    knots = phases[["first_event", "last_event"]].to_numpy(dtype=float).ravel()
    if not knots.size:
        return np.array([0.0, float(points["event"].max() if len(points) else 1)]), np.array([0.0, 1.0])
    shares = np.diff(knots) / max(knots[-1] - knots[0], 1.0)
    shares[::2] = np.maximum(shares[::2], min(_MIN_SHARE, 1 / len(phases)))
    return knots, np.concatenate([[0.0], np.cumsum(shares)])


def _mark_phases(axes: Axes, phases: pd.DataFrame, knots: Floats, places: Floats) -> None:
    """Draws a line where each phase begins, its name above and the number of that event below."""
    at = axes.get_xaxis_transform()
    ends = zip(phases["phase"], places[::2], places[1::2], strict=False)
    for i, (name, left, right) in enumerate(ends):
        if i:
            axes.axvline(left, color=_BOUNDARY, linewidth=0.8, linestyle=":")
        share = (right - left) / places[-1]
        if share < _UNNAMED_SHARE:
            continue
        rotation = 0 if share >= _UPRIGHT_SHARE else 90
        words = {"rotation": rotation, "fontsize": 8 if rotation == 0 else 6.5}
        text = str(name).replace("_", " ")
        axes.text((left + right) / 2, 1.01, text, transform=at, ha="center", va="bottom", **words)  # type: ignore[arg-type]
    marked = [0, *(i for i in range(2, len(knots), 2)), len(knots) - 1] if len(phases) else []
    room = 0.06 * places[-1]
    shown = [i for n, i in enumerate(marked) if n == 0 or places[i] - places[marked[n - 1]] >= room]
    axes.set_xticks([float(places[i]) for i in shown], [f"{knots[i]:,.0f}" for i in shown], fontsize=8)


def _mark_peak(axes: Axes, x: Floats, total: Floats) -> None:
    if not total.size:
        return
    highest = int(np.argmax(total))
    place, height = float(x[highest]), float(total[highest])
    left, right = axes.get_xlim()
    side = "right" if place > (left + right) / 2 else "left"
    axes.plot([place], [height], marker="o", markersize=5, color=COLORS[0], linestyle="none")
    axes.annotate(
        f"peak {height:.3g} GiB",
        (place, height),
        xytext=(-7 if side == "right" else 7, 3),
        textcoords="offset points",
        ha=side,
        va="bottom",
        fontsize=9,
    )
