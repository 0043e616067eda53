"""The section that says where the memory is: by part, over one step, and against what a sweep varies."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from rlhfreports import frames
from rlhfreports.columns import parts_of
from rlhfreports.page.blocks import Block, Chart, Section
from rlhfreports.page.charts import (
    HEIGHT,
    LENGTH_TITLE,
    legend_filter,
    line_dash,
    lines_in_order,
    method_scales,
    part_scale,
    select,
    specification,
)
from rlhfreports.page.data import Page, Run
from rlhfreports.tables import GIB, outcome_word
from rlhfreports.timelines import scale

_BAR_PX = 30
_GIB = "GiB at the step's highest total"
_PARTS_CAPTION = (
    "Live bytes by part at the moment of the step's highest total. Frozen weights are grey. A method that was not "
    "measured at this size has its outcome in place of a bar."
)
_TIMELINE_CAPTION = (
    "Live bytes by part over the events of one step: tensors made, named and freed. Short phases are widened. Move "
    "over the chart to read a moment: its phase, total and event."
)
_LENGTH_CAPTION = "Memory against sequence length, both axes logarithmic. A flat line is memory that no length changes."
_SWEPT_CAPTION = "Total memory against a number that the sweep varies, at one length and batch size."


def parts_section(page: Page) -> Section | None:
    """Stacked bars by part, the timeline of a step, memory against length and against swept numbers."""
    parts = frames.parts(page.frame)
    if parts.empty:
        return None
    blocks: list[Block] = [parts_chart(page, parts)]
    for run in page.runs:
        chart = timeline_chart(run, f"timeline-{page.runs.index(run)}", run.name if len(page.runs) > 1 else "")
        blocks += [chart] if chart else []
    blocks.append(length_chart(page))
    swept = frames.swept(page.frame)
    blocks += [swept_chart(page, swept)] if len(swept) else []
    return Section(id="parts", title="Where the memory is", blocks=blocks)


def parts_chart(page: Page, parts: pd.DataFrame) -> Chart:
    """One bar a method, stacked by part; a switch chooses length and batch size."""
    failed = page.frame[page.frame["outcome"] != "ok"]
    marks = pd.DataFrame(
        {
            "size": frames.size_of(page.frame).reindex(failed.index),
            "line": frames.line_of(page.frame).reindex(failed.index),
            "word": failed["outcome"].map(outcome_word),
            "error": failed["error"],
        }
    )
    counts = parts.groupby("size", sort=False)["line"].nunique()
    fullest = str(counts[counts == counts.max()].index[-1])  # the last has the largest cases
    y = alt.Y("line:N", title=None, sort=lines_in_order(page.frame), axis=alt.Axis(labelLimit=260))
    bars = (
        alt.Chart(alt.NamedData("parts"))
        .transform_filter("datum.size === size")
        .transform_joinaggregate(total="sum(gib)", groupby=["line"])
        .mark_bar()
        .encode(
            y=y,
            x=alt.X("gib:Q", stack="zero", title=_GIB),
            color=alt.Color("part:N", scale=part_scale(page.frame)),
            order=alt.Order("place:Q"),
            tooltip=[
                alt.Tooltip("line:N", title="method"),
                alt.Tooltip("part:N", title="part"),
                alt.Tooltip("gib:Q", title="GiB", format=".4~g"),
                alt.Tooltip("total:Q", title="total GiB", format=".4~g"),
            ],
        )
    )
    totals = (
        alt.Chart(alt.NamedData("parts"))
        .transform_filter("datum.size === size")
        .transform_aggregate(total="sum(gib)", groupby=["line"])
        .mark_text(align="left", dx=5)
        .encode(y=y, x="total:Q", text=alt.Text("total:Q", format=".3~g"))
    )
    words = (
        alt.Chart(alt.NamedData("failed-sizes"))
        .transform_filter("datum.size === size")
        .mark_text(align="left", dx=5, fontWeight="bold")
        .encode(y=y, x=alt.datum(0), text="word:N", tooltip=[alt.Tooltip("error:N", title="why")])
    )
    layers = [bars, totals, *([words] if len(marks) else [])]
    made = alt.layer(*layers).add_params(select("size", list(counts.index), "size", fullest))
    return Chart(
        id="parts-bars",
        title="Memory by part",
        caption=_PARTS_CAPTION,
        spec=specification(made.properties(height=_BAR_PX * int(counts.max())), description=_PARTS_CAPTION),
        data={"parts": parts} | ({"failed-sizes": marks} if len(marks) else {}),
    )


def timeline_frames(run: Run) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The timelines of a run for its chart.

    Returns:
        The areas: ``case`` (in words), ``x`` (a place between 0 and 1), ``part``, ``place`` and ``gib``. The moments:
        ``case``, ``x``, ``event``, ``phase`` and ``gib`` (the total). The phases: ``case``, ``phase``,
        ``left``, ``right`` and ``middle``.
    """
    cases = run.frame.drop_duplicates("case_id").set_index("case_id")
    words: Any = frames.line_of(cases) + ", " + frames.size_of(cases) if len(cases) else {}
    areas, moments, spans = [], [], []
    for case_id, (points, phases) in run.timelines.items():
        if case_id not in words:
            continue
        case = words[case_id]
        knots, places = scale(points, phases)
        inside = points[points["event"].between(int(knots[0]), int(knots[-1]))]
        x = np.interp(inside["event"].to_numpy(dtype=float), knots, places) / places[-1]
        lefts, rights = places[0:-1:2] / places[-1], places[1::2] / places[-1]
        names = [str(name).replace("_", " ") for name in phases["phase"]]
        parts = [part for part in parts_of(points) if (inside[f"{part}_part_bytes"] > 0).any()]
        total = inside[[f"{part}_part_bytes" for part in parts]].sum(axis=1) / GIB
        for place, part in enumerate(parts_of(points)):
            if part in parts:
                gib = inside[f"{part}_part_bytes"].to_numpy(dtype=float) / GIB
                part_rows = {"case": case, "x": x, "part": part.replace("_", " "), "place": place, "gib": gib}
                areas.append(pd.DataFrame(part_rows))
        at = np.clip(np.searchsorted(lefts, x, side="right") - 1, 0, None) if names else None
        moments.append(
            pd.DataFrame(
                {
                    "case": case,
                    "x": x,
                    "event": inside["event"].to_numpy(),
                    "phase": "" if at is None else [names[i] for i in at],
                    "gib": total.to_numpy(dtype=float),
                }
            )
        )
        middle = (lefts + rights) / 2
        spans.append(pd.DataFrame({"case": case, "phase": names, "left": lefts, "right": rights, "middle": middle}))
    if not areas:
        return pd.DataFrame(), pd.DataFrame(), pd.DataFrame()
    joined = (pd.concat(rows, ignore_index=True) for rows in (areas, moments, spans))
    return next(joined), next(joined), next(joined)


def timeline_chart(run: Run, name: str, title: str) -> Chart | None:
    """Live bytes over the events of one step, as areas by part; a switch chooses the case."""
    areas, moments, spans = timeline_frames(run)
    if areas.empty:
        return None
    x = alt.X("x:Q", title="events of one step", axis=alt.Axis(labels=False, ticks=False, grid=False))
    in_case = "datum.case === shown_case"
    area = (
        alt.Chart(alt.NamedData(name))
        .transform_filter(in_case)
        .mark_area()
        .encode(
            x=x,
            y=alt.Y("gib:Q", stack="zero", title="GiB"),
            color=alt.Color("part:N", scale=part_scale(run.frame)),
            order=alt.Order("place:Q"),
        )
    )
    phases = alt.Chart(alt.NamedData(f"{name}-phases")).transform_filter(in_case)
    ends = phases.mark_rule(strokeDash=[2, 3]).encode(x=alt.X("left:Q"))
    names = (
        phases.transform_filter("datum.right - datum.left > 0.07")
        .mark_text(baseline="bottom", dy=-3)
        .encode(x=alt.X("middle:Q"), y=alt.value(0), text="phase:N")
    )
    near = alt.selection_point(
        name="near", fields=["x"], nearest=True, on="pointermove", clear="pointerout", empty=False
    )
    moment = (
        alt.Chart(alt.NamedData(f"{name}-moments"))
        .transform_filter(in_case)
        .mark_rule()
        .encode(
            x=x,
            opacity=alt.condition(near, alt.value(0.8), alt.value(0)),
            tooltip=[
                alt.Tooltip("phase:N", title="phase"),
                alt.Tooltip("gib:Q", title="total GiB", format=".4~g"),
                alt.Tooltip("event:Q", title="event", format=","),
            ],
        )
        .add_params(near)
    )
    cases = list(dict.fromkeys(areas["case"]))
    made = alt.layer(area, ends, names, moment).add_params(select("shown_case", cases, "case", cases[-1]))
    return Chart(
        id=name,
        title=f"Memory over one step{f', {title}' if title else ''}",
        caption=_TIMELINE_CAPTION,
        spec=specification(made.properties(height=HEIGHT), description=_TIMELINE_CAPTION),
        data={name: areas, f"{name}-moments": moments, f"{name}-phases": spans},
    )


def length_chart(page: Page) -> Chart:
    """Memory against length, log-log; switches choose batch size and kind of memory."""
    data = frames.memory(page.frame)
    lengths = sorted({int(length) for length in data["seq_len"]})
    axis = alt.Axis(values=lengths, labelOverlap=True, format="d")
    domain = [lengths[0], max(lengths[-1], lengths[0] + 1)]
    x = alt.X("seq_len:Q", title=LENGTH_TITLE, axis=axis)
    x = x.scale(type="log", nice=False, padding=24, domain=domain)
    panels, kinds = list(dict.fromkeys(data["panel"])), list(dict.fromkeys(data["what"]))
    switches = [select("panel", panels, "batch"), select("what", kinds, "memory")]
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
    x = alt.X("value:Q", title="value").scale(zero=False)
    made = _memory_lines(page, "swept", "datum.axis === axis && datum.size === size", x)
    return Chart(
        id="memory-swept",
        title="Memory against what the sweep varies",
        caption=_SWEPT_CAPTION,
        spec=specification(
            made.add_params(*switches).properties(height=HEIGHT), description=_SWEPT_CAPTION, title="GiB"
        ),
        data={"swept": swept},
    )


def _memory_lines(page: Page, source: str, chosen: str, x: alt.X) -> Any:
    """Lines and points of ``gib`` over ``x``, both in the colours of methods."""
    colors, shapes = method_scales(page.frame)
    shown = legend_filter()
    base = (
        alt.Chart(alt.NamedData(source))
        .transform_filter(chosen)
        .encode(
            x=x,
            y=alt.Y("gib:Q", title=None, scale=alt.Scale(type="log", nice=False, padding=16)),
            color=alt.Color("title:N", scale=colors),
            detail="line:N",
            opacity=alt.condition(shown, alt.value(1), alt.value(0.08)),
        )
    )
    tooltip: list[Any] = [
        alt.Tooltip("line:N", title="method"),
        alt.Tooltip("seq_len:Q", title="tokens"),
        alt.Tooltip("batch_size:Q", title="batch size"),
        alt.Tooltip("gib:Q", title="GiB", format=".4~g"),
    ]
    dots = base.mark_point(filled=True, size=70, opacity=1).encode(
        shape=alt.Shape("title:N", scale=shapes), tooltip=tooltip
    )
    return alt.layer(base.mark_line(strokeWidth=2).encode(**line_dash(page.frame)), dots).add_params(shown)
