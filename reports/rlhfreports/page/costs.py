"""The chart that the answer stands on: memory and time of each method at one size."""

from __future__ import annotations

import altair as alt
import pandas as pd

from rlhfreports import frames
from rlhfreports.memory import interval_texts
from rlhfreports.page.blocks import Chart
from rlhfreports.page.charts import HEIGHT, by_size, legend_filter, method_scales, select, specification
from rlhfreports.page.tooltips import tooltips
from rlhfreports.tables import ABSENT

_CAPTION = (
    "Each point is a method: the nearer to the lower left corner, the less it costs. A click on a method in the legend "
    "shows it alone."
)
_INTERVALS = " Bars are 95 % intervals of the time."


def costs_chart(frame: pd.DataFrame) -> Chart | None:
    """Seconds per sample over GiB, from zero on both axes; ``None`` where no size has two lines."""
    points = frames.costs(frame)
    if points.empty or by_size(points)[2] < 2:
        return None
    half = (points["high"] - points["seconds"]).where(points["high"] > points["seconds"])
    texts = (interval_texts(values, points["seconds"], half) for values in (points["seconds"], half))
    shown_texts = [text if width == ABSENT else f"{text} ± {width}" for text, width in zip(*texts, strict=True)]
    caption = _CAPTION + (_INTERVALS if half.notna().any() else "")
    sizes, fullest, _ = by_size(points)
    colors, shapes = method_scales(frame)
    shown = legend_filter()
    base = (
        alt.Chart(alt.NamedData("costs"))
        .transform_filter("datum.size === size")
        .encode(
            x=alt.X("gib:Q", title="GiB at the step's highest total"),
            color=alt.Color("title:N", scale=colors),
            opacity=alt.condition(shown, alt.value(1), alt.value(0.08)),
        )
    )
    bars = base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q", title=None), y2="high:Q")
    dots = base.mark_point(filled=True, size=110, opacity=1).encode(
        y=alt.Y("seconds:Q", title=None),
        shape=alt.Shape("title:N", scale=shapes),
        tooltip=tooltips("line", "gib", "shown", shown="seconds per sample"),
    )
    made = alt.layer(bars, dots).add_params(select("size", sizes, "size", fullest), shown).properties(height=HEIGHT)
    return Chart(
        id="costs",
        title="Memory and time of each method",
        caption=caption,
        spec=specification(made, description=caption, title="seconds per sample"),
        data={"costs": points.assign(shown=shown_texts)},
    )
