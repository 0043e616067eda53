"""The charts of phases: their seconds per method, and each on a roofline plot."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd

from rlhfreports.page.blocks import Block, Chart
from rlhfreports.page.charts import (
    DARK,
    HEIGHT,
    by_mode,
    lines_in_order,
    method_scales,
    names_axis,
    select,
    specification,
)
from rlhfreports.page.data import Page
from rlhfreports.page.tooltips import tooltips
from rlhfreports.phases import ceilings, phase_points, roofline_points
from rlhfreports.styles import COLORS

ALL = "all"
_MAX_POINTS = 1000  # that one choice of the roofline shows: 5,000 took up to 0.25 s to draw
# Of phases in their order: neighbours in a bar differ most.
_PHASE_COLORS = tuple(COLORS[i] for i in (4, 2, 3, 1, 6, 5, 9, 10))
_SYMBOLS = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
_STEP = 22  # pixels of a bar


def phase_blocks(page: Page) -> list[Block]:
    """The charts that the measured cases allow: none where nothing was timed."""
    points = phase_points(page.frame)
    if points.empty:
        return []
    made: list[Block] = [_seconds(page, points)]
    roofline = roofline_points(page.frame)
    lines = ceilings(page.frame, roofline)
    if len(roofline) and len(lines):
        made.append(_roofline(page, roofline, lines))
    return made


def phase_scale(phases: Sequence[str]) -> alt.Scale:
    """The scale from phases, in their order, to colours."""
    colors = [_PHASE_COLORS[i % len(_PHASE_COLORS)] for i in range(len(phases))]
    return alt.Scale(domain=list(phases), range=[by_mode(color, DARK[color]) for color in colors])


def _sizes(points: pd.DataFrame) -> list[str]:
    """Length, batch size and what else varies, the largest first."""
    ordered = points.sort_values(["seq_len", "batch_size"], ascending=False, kind="stable")
    return list(ordered["size"].drop_duplicates())


def _in_order(points: pd.DataFrame) -> list[str]:
    return list(points.sort_values("order", kind="stable")["phase"].drop_duplicates())


def _seconds(page: Page, points: pd.DataFrame) -> Chart:
    caption = (
        "Seconds per sample of each phase, stacked in the order in which they run. The tick is the roofline: the "
        "least time of the whole step at the ceilings below."
    )
    phases = _in_order(points)
    lines = lines_in_order(page.frame)
    y = alt.Y("line:N", title=None, scale=alt.Scale(domain=lines), axis=names_axis(320))
    base = alt.Chart(alt.NamedData("phases")).transform_filter("datum.size === size")
    bars = base.mark_bar().encode(
        y=y,
        x=alt.X("sum(seconds_per_sample):Q", title="seconds per sample"),
        color=alt.Color("phase:N", scale=phase_scale(phases), sort=phases),
        order=alt.Order("order:Q"),
        tooltip=tooltips("line", "phase", "sum(seconds_per_sample)", "sum(floor_s_per_sample)"),
    )
    floor = base.mark_tick(thickness=2, size=_STEP - 4, color=by_mode("#000000", "#FFFFFF")).encode(
        y=y,
        x=alt.X("sum(floor_s_per_sample):Q", title="seconds per sample"),
    )
    sizes = _sizes(points)
    made = alt.layer(bars, floor).add_params(select("size", sizes, "case")).properties(height=_STEP * len(lines))
    columns = ["line", "phase", "order", "size", "seconds_per_sample", "floor_s_per_sample"]
    return Chart(
        id="phase-seconds",
        title="Time by phase",
        caption=caption,
        spec=specification(made, description=caption),
        data={"phases": points[columns]},
    )


def _roofline(page: Page, points: pd.DataFrame, lines: pd.DataFrame) -> Chart:
    caption = (
        "Each phase of each case: arithmetic intensity (least FLOPs over least bytes) against FLOPs per second. "
        "Lines are the ceilings that the run measured. A point far below them could be faster; left of the ridge it is "
        "bound by memory, right of it by compute. A click on a method or a phase in the legend shows it alone."
    )
    machines = list(lines["machine"].drop_duplicates())
    phases = _in_order(points)
    colors, _ = method_scales(page.frame)
    by_method = alt.selection_point(name="roofline_method", fields=["title"], bind="legend")
    by_phase = alt.selection_point(name="roofline_phase", fields=["phase"], bind="legend")
    x = alt.X("intensity:Q", title="arithmetic intensity (FLOP/byte)", scale=alt.Scale(type="log", nice=False))
    y = alt.Y(
        "flops_per_s:Q",
        title="FLOP/s",
        scale=alt.Scale(type="log", nice=False, padding=12),
        axis=alt.Axis(format="~s"),
    )
    grey = by_mode("#555555", "#BBBBBB")
    of_machine = alt.Chart(alt.NamedData("ceilings")).transform_filter("datum.machine === machine")
    roof = of_machine.mark_line(color=grey, strokeWidth=1.5).encode(
        x=x,
        y=y,
        # In the order of their names: copy, matmul, read.
        strokeDash=alt.StrokeDash(
            "rate:N", scale=alt.Scale(range=[[6, 4], [1, 0], [2, 3]]), legend=alt.Legend(symbolType="stroke")
        ),
    )
    dots = (
        alt.Chart(alt.NamedData("roofline"))
        .transform_filter(f"datum.machine === machine && (size === '{ALL}' || datum.size === size)")
        .mark_point(filled=True, size=60)
        .encode(
            x=x,
            y=y,
            color=alt.Color("title:N", scale=colors),
            shape=alt.Shape(
                "phase:N",
                scale=alt.Scale(domain=phases, range=_symbols(len(phases))),
                sort=phases,
                legend=alt.Legend(symbolFillColor=grey, symbolStrokeColor=grey),
            ),
            opacity=alt.condition(by_method & by_phase, alt.value(0.85), alt.value(0.06)),
            tooltip=tooltips(
                "line",
                "phase",
                "size",
                "intensity",
                "flops_per_s",
                "floor_fraction",
                "seconds",
                size="case",
                seconds="seconds of a step",
            ),
        )
    )
    sizes = _sizes(points)
    sizes = [ALL, *sizes] if len(sizes) > 1 and len(points) <= _MAX_POINTS else sizes
    switches = [select("size", sizes, "case")]
    switches += [select("machine", machines, "machine")] if len(machines) > 1 else []
    made = alt.layer(roof, dots).add_params(*switches, by_method, by_phase).properties(height=HEIGHT + 60)
    if len(machines) == 1:
        made = made.add_params(alt.param(name="machine", value=machines[0]))
    columns = ["line", "title", "phase", "size", "machine", "intensity", "flops_per_s", "floor_fraction", "seconds"]
    return Chart(
        id="roofline",
        title="Roofline of each phase",
        caption=caption,
        spec=specification(made, description=caption),
        data={"roofline": points[columns], "ceilings": lines},
    )


def _symbols(num: int) -> list[str]:
    return [_SYMBOLS[i % len(_SYMBOLS)] for i in range(num)]
