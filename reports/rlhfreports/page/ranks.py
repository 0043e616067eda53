"""The section on several ranks: scaling, strategies beside each other, and the ranks of one case."""

from __future__ import annotations

import json
from typing import Any

import altair as alt
import pandas as pd

from rlhfreports.columns import methods_in_order
from rlhfreports.page.blocks import Block, Chart, Section, table_of
from rlhfreports.page.charts import (
    DARK,
    HEIGHT,
    SYMBOLS,
    WORDS_ROOM,
    by_mode,
    by_size,
    legend_filter,
    method_scales,
    names_axis,
    part_scale,
    select,
    specification,
)
from rlhfreports.page.data import Page
from rlhfreports.page.tooltips import tooltips
from rlhfreports.ranks import (
    AT_WORK,
    STRATEGIES,
    WAITING,
    has_ranks,
    planned_cases,
    planned_lines,
    rank_bars,
    scaling_points,
    strategy_bars,
    strategy_place,
    unmeasured,
)
from rlhfreports.scaling import SCALING, planned_table, ranks_table, scaling_table
from rlhfreports.styles import COLORS, MARKERS
from rlhfreports.tables import GIB

_BAR_PX, _MAX_CHART_PX = 30, 1600
# By the option of the switch: a column, and an expression of its value. Seconds are of the slowest rank, memory of the
# worst.
MEASURES = {
    "seconds per sample": ("total_s_per_sample", "{}"),
    "samples per second": ("total_s_per_sample", "1 / {}"),
    "efficiency (%)": ("efficiency", "100 * {}"),
    "GiB of the worst rank": ("total_bytes", f"{{}} / {GIB}"),
    "waiting (% of a step)": ("waiting_share", "100 * {}"),
    "imbalance (%)": ("imbalance", "100 * {}"),
}
_SCALING_CAPTION = (
    f"One line a method and strategy, in the method's colour with the strategy's symbol. {SCALING} A click on a method "
    "in the legend shows it alone."
)
_STRATEGIES_CAPTION = (
    "The strategies of one method at one number of ranks: what the rank with the most memory holds, or how long the "
    "slowest rank takes for a sample. Waiting is the mean share of all ranks: the slowest itself waits least. A "
    "strategy that was not measured has its outcome in place of a bar."
)
_PLANNED_CAPTION = (
    "Dashed lines and hollow points are planned, without running; filled points are measured, on the rank that holds "
    "most."
)
_RANKS_CAPTION = (
    "Each rank of the largest case of a method and strategy: what it holds, or the step in which collectives were "
    "counted, which is slower than the timed ones. Equally busy ranks wait equally long. Of more than 64 ranks, the "
    "first 64."
)


def ranks_section(page: Page) -> Section | None:
    """Charts and tables of the cases over ranks; ``None`` where there are none."""
    if not has_ranks(page.frame):
        return None
    blocks: list[Block] = []
    bars, points = strategy_bars(page.frame), scaling_points(page.frame)
    if len(bars):
        marks = unmeasured(page.frame)
        blocks.append(_bars_chart(page, "strategies", "Comparison of strategies", _STRATEGIES_CAPTION, bars, marks))
    filters = ("method", "ranks share by", "tokens", "ranks")
    blocks.append(table_of(ranks_table(page.frame), name="ranks-table", filters=filters))
    if len(points):
        blocks.append(_scaling_chart(page, points))
        filters = ("method", "ranks share by", "scaling", "tokens")
        blocks.append(table_of(scaling_table(page.frame), name="scaling-table", is_folded=True, filters=filters))
    planned = planned_cases(page.frame, page.plans)
    if len(planned):
        lines = planned_lines(planned)
        blocks += [_planned_chart(page, lines)] if len(lines) else []
        table = planned_table(page.frame, page.plans)
        blocks.append(table_of(table, name="planned-ranks-table", filters=("method", "ranks share by", "ranks")))
    for i, run in enumerate(page.runs):
        of_ranks = rank_bars(run.frame, run.ranks)
        if len(of_ranks):
            title = "The ranks of one case" + (f", {run.name}" if len(page.runs) > 1 else "")
            blocks.append(_bars_chart(page, f"each-rank-{i}", title, _RANKS_CAPTION, of_ranks, None))
    return Section(id="ranks", title="Over several ranks", blocks=blocks)


def _bars_chart(
    page: Page, name: str, title: str, caption: str, bars: pd.DataFrame, marks: pd.DataFrame | None
) -> Chart:
    """One bar a label, stacked by part; switches choose what stands together, memory or time, and the method."""
    source = "datum.at === at && datum.what === what && datum.title === method"
    if marks is None:  # what stands together says its method
        source = "datum.at === at && datum.what === what"
    of_bars = alt.Chart(alt.NamedData(name)).transform_filter(source)
    y = alt.Y("label:N", title=None, sort=_labels(bars, marks), axis=names_axis())
    scale = _piece_scale(page, set(bars["part"]))
    pieces = of_bars.mark_bar().encode(
        y=y,
        x=alt.X("value:Q", stack="zero", title=None, scale=alt.Scale(range=[0, alt.ExprRef(WORDS_ROOM)])),
        color=alt.Color("part:N", scale=scale, legend=alt.Legend(values=alt.ExprRef(_pieces_of(bars, scale)))),
        order=alt.Order("place:Q"),
        tooltip=tooltips("label", "part", "value", "words"),
    )
    words = (
        of_bars.transform_aggregate(total="sum(value)", groupby=["label", "words"])
        .mark_text(align="left", dx=5)
        .encode(y=y, x="total:Q", text="words:N")
    )
    layers: list[Any] = [pieces, words]
    data = {name: bars}
    if marks is not None and len(marks):
        layers.append(
            alt.Chart(alt.NamedData(f"{name}-failed"))
            .transform_filter("datum.at === at && datum.title === method")
            .mark_text(align="left", dx=5, fontWeight="bold")
            .encode(y=y, x=alt.datum(0), text="word:N", tooltip=tooltips("error"))
        )
        data[f"{name}-failed"] = marks
    worlds, fullest, num_labels = by_size(bars, "at", "label")
    switches = [
        select("what", list(dict.fromkeys(bars["what"])), "show"),
        select("at", worlds, "case" if marks is None else "at", fullest),
    ]
    if marks is not None:
        methods = [title for title in methods_in_order(page.frame)["method_title"] if title in set(bars["title"])]
        at_fullest = set(bars.loc[bars["at"] == fullest, "title"])
        switches.append(select("method", methods, "method", next(title for title in methods if title in at_fullest)))
    height = min(_BAR_PX * (num_labels + (0 if marks is None else marks["label"].nunique())), _MAX_CHART_PX)
    return Chart(
        id=name,
        title=title,
        caption=caption,
        spec=specification(
            alt.layer(*layers).add_params(*switches).properties(height=max(height, 2 * _BAR_PX)),
            description=caption,
            title={"expr": "what"},
        ),
        data=data,
    )


def _labels(bars: pd.DataFrame, marks: pd.DataFrame | None) -> list[str]:
    """The labels of bars in their order: strategies by how much they divide, ranks by their number."""
    labels = [*bars["label"], *([] if marks is None else marks["label"])]
    return sorted(dict.fromkeys(labels), key=lambda label: strategy_place(label.split(", ")[0]))


def _piece_scale(page: Page, shown: set[str]) -> alt.Scale:
    """The colours of the pieces that are ``shown``: parts of memory, and time at work and waiting."""
    parts = part_scale(page.frame).to_dict()
    times = [by_mode(COLORS[i], DARK[COLORS[i]]) for i in (9, 10)]
    colors = zip([*parts["domain"], AT_WORK, WAITING], [*parts["range"], *times], strict=True)
    found = {name: color for name, color in colors if name in shown}
    return alt.Scale(domain=list(found), range=list(found.values()))


def _pieces_of(bars: pd.DataFrame, scale: alt.Scale) -> str:
    """An expression of the names in the legend: those of what the bars are made of now."""
    names = scale.to_dict()["domain"]
    shown = {what: set(rows["part"]) for what, rows in bars.groupby("what", sort=False)}
    pieces = {what: [name for name in names if name in parts] for what, parts in shown.items()}
    return f"({json.dumps(pieces)})[what]"


def _scaling_chart(page: Page, points: pd.DataFrame) -> Chart:
    """A measure against the number of ranks; switches choose the measure, and the batch that is held."""
    columns = ["title", "strategy", "line", "at", "world_size", "batch_size", "total_s_per_sample", "efficiency"]
    data = points[[*columns, "total_bytes", "waiting_share", "imbalance"]]
    measured = {name: entry for name, entry in MEASURES.items() if data[entry[0]].notna().any()}
    measures = {name: how.format(f"datum.{column}") for name, (column, how) in measured.items()}
    value = "NaN"
    for name, expression in measures.items():
        value = f"measure === '{name}' ? {expression} : {value}"
    shown = legend_filter()
    line, dots = _over_ranks(page, "scaling", data, value, shown)
    switches = [
        select("at", list(dict.fromkeys(data["at"])), "batch held"),
        select("measure", list(measures), "measure"),
    ]
    made = alt.layer(line, dots).add_params(*switches, shown).properties(height=HEIGHT)
    return Chart(
        id="scaling",
        title="Scaling over ranks",
        caption=_SCALING_CAPTION,
        spec=specification(made, description=_SCALING_CAPTION, title={"expr": "measure"}),
        data={"scaling": data},
    )


assert len(STRATEGIES) <= len(MARKERS)


def _planned_chart(page: Page, lines: pd.DataFrame) -> Chart:
    """Planned and measured memory of a rank against the number of ranks; a switch chooses the batch that is held."""
    columns = ["title", "strategy", "line", "at", "world_size", "batch_size"]
    data = lines[[*columns, "planned_bytes", "measured_bytes", "error_percent"]]
    shown = legend_filter()
    line, hollow = _over_ranks(page, "planned-ranks", data, f"datum.planned_bytes / {GIB}", shown)
    _, filled = _over_ranks(page, "planned-ranks", data, f"datum.measured_bytes / {GIB}", shown)
    layers = (line.mark_line(strokeWidth=2, strokeDash=[6, 4]), hollow.mark_point(size=160), filled)
    switch = select("at", list(dict.fromkeys(data["at"])), "batch held")
    made = alt.layer(*layers).add_params(switch, shown).properties(height=HEIGHT)
    return Chart(
        id="planned-ranks",
        title="Planned memory of more ranks",
        caption=_PLANNED_CAPTION,
        spec=specification(made, description=_PLANNED_CAPTION, title="GiB of a rank"),
        data={"planned-ranks": data},
    )


def _over_ranks(page: Page, name: str, data: pd.DataFrame, value: str, shown: Any) -> tuple[Any, Any]:
    """Lines and points of ``value`` against the number of ranks.

    Args:
        page: the page.
        name: of the data source.
        data: its rows: ``at``, ``title``, ``strategy``, ``line``, ``world_size``, ``batch_size``.
        value: an expression.
        shown: the methods that are chosen in the legend.
    """
    strategies = sorted(dict.fromkeys(data["strategy"]), key=strategy_place)
    shapes = [SYMBOLS[MARKERS[strategy_place(name) % len(MARKERS)]] for name in strategies]
    worlds = sorted({int(size) for size in data["world_size"]})
    colors, _ = method_scales(page.frame)
    grey = by_mode("#555555", "#BBBBBB")
    base = (
        alt.Chart(alt.NamedData(name))
        .transform_filter("datum.at === at")
        .transform_calculate(value=value)
        .transform_filter("isValid(datum.value) && isFinite(datum.value)")
        .encode(
            x=alt.X(
                "world_size:Q",
                title="ranks",
                scale=alt.Scale(type="log", base=2, nice=False, padding=24),
                axis=alt.Axis(values=worlds, format="d"),
            ),
            y=alt.Y("value:Q", title=None),
            color=alt.Color("title:N", scale=colors),
            detail="line:N",
            opacity=alt.condition(shown, alt.value(1), alt.value(0.08)),
        )
    )
    dots = base.mark_point(filled=True, size=80, opacity=1).encode(
        shape=alt.Shape(
            "strategy:N",
            scale=alt.Scale(domain=strategies, range=shapes),
            sort=strategies,
            legend=alt.Legend(symbolFillColor=grey, symbolStrokeColor=grey),
        ),
        tooltip=tooltips("line", "world_size", "batch_size", "value"),
    )
    return base.mark_line(strokeWidth=2), dots
