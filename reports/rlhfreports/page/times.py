"""The section of latency and throughput against sequence length."""

from __future__ import annotations

from typing import Any

import altair as alt

from rlhfreports import frames
from rlhfreports.page.blocks import Chart, Section
from rlhfreports.page.charts import HEIGHT, method_scales, select, specification
from rlhfreports.page.data import Page

# What the y axis shows, by the option of the switch: an expression of one row's seconds.
MEASURES = {
    "seconds per sample": "{}",
    "seconds per token": "{} / datum.tokens",
    "samples per second": "1 / {}",
    "tokens per second": "datum.tokens / {}",
}


def times_section(page: Page) -> Section | None:
    """Seconds per sample and throughput against sequence length, both axes logarithmic."""
    points = frames.times(page.frame)
    if points.empty:
        return None
    return Section(id="times", title="Latency and throughput against sequence length", blocks=[_chart(page, points)])


def _chart(page: Page, points: Any) -> Chart:
    caption = (
        "One line a method, both axes logarithmic, the 95 % interval as a band. The switches choose the batch size, "
        "the part of the step, and seconds or throughput. A click on a method in the legend shows it alone."
    )
    panels = list(dict.fromkeys(points["panel"]))
    kinds = [kind for kind in frames.KINDS if (points["kind"] == kind).any()]
    chosen = alt.selection_point(name="shown", fields=["title"], bind="legend")
    colors, shapes = method_scales(page.frame)
    base = (
        alt.Chart(alt.NamedData("times"))
        .transform_filter("datum.panel === panel && datum.kind === kind")
        .transform_calculate(**{name: _measured(name) for name in ("seconds", "low", "high")})
        .encode(
            x=alt.X("seq_len:Q", title="sequence length (tokens)", scale=alt.Scale(type="log", nice=False)),
            color=alt.Color("title:N", scale=colors),
            detail="line:N",
            opacity=alt.condition(chosen, alt.value(1), alt.value(0.12)),
        )
    )
    y: dict[str, Any] = {"scale": alt.Scale(type="log", zero=False), "title": None}
    band = base.mark_area(opacity=0.2).encode(y=alt.Y("low:Q", **y), y2="high:Q")
    line = base.mark_line().encode(y=alt.Y("seconds:Q", **y))
    dots = base.mark_point(filled=True, size=70).encode(
        y=alt.Y("seconds:Q", **y),
        shape=alt.Shape("title:N", scale=shapes),
        tooltip=[
            alt.Tooltip("line:N", title="method"),
            alt.Tooltip("seq_len:Q", title="tokens"),
            alt.Tooltip("batch_size:Q", title="batch size"),
            alt.Tooltip("seconds:Q", title="value", format=".3~g"),
            alt.Tooltip("low:Q", title="95 % interval from", format=".3~g"),
            alt.Tooltip("high:Q", title="to", format=".3~g"),
        ],
    )
    switches = [
        select("panel", panels, "batch"),
        select("kind", kinds, "part of the step"),
        select("measure", list(MEASURES), "measure"),
    ]
    made = alt.layer(band, line, dots).add_params(*switches, chosen).properties(height=HEIGHT)
    return Chart(
        id="latency",
        title="Time against sequence length",
        caption=caption,
        spec=specification(made, description=caption),
        data={"times": points},
    )


def _measured(name: str) -> str:
    """The expression of a measure, of ``seconds`` or an end of its interval."""
    found = "NaN"
    for measure, expression in MEASURES.items():
        found = f"measure === '{measure}' ? {expression.format(f'datum.{name}')} : {found}"
    return found
