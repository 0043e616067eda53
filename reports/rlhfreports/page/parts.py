"""The section that says where the memory is: by part, over one step, and against what a sweep varies."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from rlhfreports import frames
from rlhfreports.page.blocks import Block, Chart, Section, Text
from rlhfreports.page.charts import (
    HEIGHT,
    NUMBER,
    by_size,
    legend_filter,
    length_axis,
    line_dash,
    lines_in_order,
    method_scales,
    names_axis,
    part_color,
    select,
    specification,
)
from rlhfreports.page.data import Page
from rlhfreports.page.timeline import timeline_chart
from rlhfreports.page.tooltips import tooltips
from rlhfreports.tables import outcome_word

_BAR_PX = 30
_GIB = "GiB at the step's highest total"
_PARTS_CAPTION = "Live bytes by part at the moment of the step's highest total. Frozen weights are grey."
_UNMEASURED = " A method that was not measured at this size has its outcome in place of a bar."
_LENGTH_CAPTION = "Memory against sequence length, both axes logarithmic. A flat line is memory that no length changes."
_SWEPT_CAPTION = "Total memory against a number that the sweep varies, at one length and batch size, all else equal."
_SWEPT_OPTIONS = " A case is left out where the option has the value of its setting, which no row names."


def parts_section(page: Page) -> Section | None:
    """Stacked bars by part, the timeline of a step, memory against length and against swept numbers."""
    parts = frames.parts(page.frame)
    if parts.empty:
        return None
    blocks: list[Block] = [*_loads(page.frame), parts_chart(page, parts)]
    for run in page.runs:
        chart = timeline_chart(run, f"timeline-{page.runs.index(run)}", run.name if len(page.runs) > 1 else "")
        blocks += [chart] if chart else []
    memory = frames.memory(page.frame)
    if (memory.groupby(["panel", "line"])["seq_len"].nunique() > 1).any():
        blocks.append(length_chart(page, memory))
    swept = frames.swept(page.frame)
    blocks += [swept_chart(page, swept)] if len(swept) else []
    return Section(id="parts", title="Where the memory is", blocks=blocks)


def _loads(frame: pd.DataFrame) -> list[Text]:
    """The weights that each method loads, in one sentence: most of what their memory differs by."""
    methods = frame[frame["loads"].notna()].sort_values("method_order", kind="stable").drop_duplicates("method")
    found = [f"{title}, {loads}" for title, loads in zip(methods["method_title"], methods["loads"], strict=True)]
    return [Text(text=f"What each method loads: {'; '.join(found)}.")] if found else []


def parts_chart(page: Page, parts: pd.DataFrame) -> Chart:
    """One bar a method, stacked by part; a switch chooses length and batch size."""
    failed = page.frame[page.frame["outcome"] != "ok"]
    marks = pd.DataFrame(
        {
            "size": frames.size_of(frames.of_memory(page.frame)).reindex(failed.index),
            "line": frames.line_of(page.frame).reindex(failed.index),
            "word": failed["outcome"].map(outcome_word),
            "error": failed["error"],
        }
    )
    sizes, fullest, _ = by_size(parts)
    num_lines = by_size(pd.concat([parts[["size", "line"]], marks[["size", "line"]]]))[2]
    y = alt.Y("line:N", title=None, sort=lines_in_order(page.frame), axis=names_axis())
    bars = (
        alt.Chart(alt.NamedData("parts"))
        .transform_filter("datum.size === size")
        .transform_joinaggregate(total="sum(gib)", groupby=["line"])
        .mark_bar()
        .encode(
            y=y,
            x=alt.X("gib:Q", stack="zero", title=_GIB, scale=alt.Scale(range=[0, alt.ExprRef("width - 45")])),
            color=part_color(page.frame),
            order=alt.Order("place:Q"),
            tooltip=tooltips("line", "part", "gib", "total"),
        )
    )
    totals = (
        alt.Chart(alt.NamedData("parts"))
        .transform_filter("datum.size === size")
        .transform_aggregate(total="sum(gib)", groupby=["line"])
        .mark_text(align="left", dx=5)
        .encode(y=y, x="total:Q", text=alt.Text("total:Q", format=".3g"))
    )
    words = (
        alt.Chart(alt.NamedData("failed-sizes"))
        .transform_filter("datum.size === size")
        .mark_text(align="left", dx=5, fontWeight="bold")
        .encode(y=y, x=alt.datum(0), text="word:N", tooltip=tooltips("error"))
    )
    layers = [bars, totals, *([words] if len(marks) else [])]
    made = alt.layer(*layers).add_params(select("size", sizes, "size", fullest))
    caption = _PARTS_CAPTION + (_UNMEASURED if len(marks) else "")
    return Chart(
        id="parts-bars",
        title="Memory by part",
        caption=caption,
        spec=specification(made.properties(height=_BAR_PX * num_lines), description=caption),
        data={"parts": parts} | ({"failed-sizes": marks} if len(marks) else {}),
    )


def length_chart(page: Page, data: pd.DataFrame) -> Chart:
    """The rows of ``frames.memory`` against length, log-log; switches choose batch size and kind of memory."""
    x = length_axis(sorted({int(length) for length in data["seq_len"]}))
    panels, kinds = list(dict.fromkeys(data["panel"])), list(dict.fromkeys(data["what"]))
    switches = [select("panel", panels, "cases"), select("what", kinds, "memory")]
    chosen = "datum.panel === panel && datum.what === what"
    made = _memory_lines(page, "memory", chosen, x).add_params(*switches).properties(height=HEIGHT)
    return Chart(
        id="memory-length",
        title="Memory against sequence length",
        caption=_LENGTH_CAPTION,
        spec=specification(made, description=_LENGTH_CAPTION, title="GiB"),
        data={"memory": data},
    )


def swept_chart(page: Page, swept: pd.DataFrame) -> Chart:
    """Total memory against a number that the sweep varies."""
    axes, sizes = list(dict.fromkeys(swept["axis"])), list(dict.fromkeys(swept["size"]))
    switches = [select("axis", axes, "against"), select("size", sizes, "size", sizes[-1])]
    ticks = sorted(swept["value"].astype("float64").unique().tolist())
    x = alt.X(
        "value:Q",
        title=axes[0] if len(axes) == 1 else None,
        scale=alt.Scale(zero=False, nice=False, padding=24),
        axis=alt.Axis(format="~g", values=ticks if len(axes) == 1 else alt.Undefined, labelOverlap=True),
    )
    caption = _SWEPT_CAPTION + (_SWEPT_OPTIONS if set(axes) - {frames.LORA_RANK} else "")
    made = _memory_lines(page, "swept", "datum.axis === axis && datum.size === size", x, "value")
    return Chart(
        id="memory-swept",
        title="Memory against what the sweep varies",
        caption=caption,
        spec=specification(
            made.add_params(*switches).properties(height=HEIGHT),
            description=caption,
            title="GiB" if len(axes) == 1 else {"expr": "'GiB, against ' + axis"},
        ),
        data={"swept": swept},
    )


def _memory_lines(page: Page, source: str, chosen: str, x: alt.X, *more: str) -> Any:
    """Lines and points of ``gib`` over ``x``, in the colours of methods; ``more`` are fields for the tooltip."""
    colors, shapes = method_scales(page.frame)
    shown = legend_filter()
    base = (
        alt.Chart(alt.NamedData(source))
        .transform_filter(chosen)
        .encode(
            x=x,
            y=alt.Y("gib:Q", title=None, scale=alt.Scale(type="log", nice=False, padding=16)).axis(format=NUMBER),
            color=alt.Color("title:N", scale=colors),
            detail="line:N",
            opacity=alt.condition(shown, alt.value(1), alt.value(0.08)),
        )
    )
    tooltip = tooltips("line", "seq_len", "batch_size", *more, "gib")
    dots = base.mark_point(filled=True, size=70, opacity=1).encode(
        shape=alt.Shape("title:N", scale=shapes), tooltip=tooltip
    )
    return alt.layer(base.mark_line(strokeWidth=2).encode(**line_dash(page.frame)), dots).add_params(shown)
