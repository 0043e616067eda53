"""The first section, with the answer, and the sections that compare runs with each other and with the papers."""

from __future__ import annotations

import altair as alt
import pandas as pd

from rlhfreports import frames
from rlhfreports.answer import answer
from rlhfreports.compare import compared, comparison_sentences, comparison_table
from rlhfreports.gain import gain_table, has_gain
from rlhfreports.page.blocks import Block, Chart, Section, Text, table_of
from rlhfreports.page.charts import HEIGHT, LENGTH_TITLE, method_scales, names_axis, select, specification
from rlhfreports.page.costs import costs_chart
from rlhfreports.page.data import Page
from rlhfreports.page.tooltips import tooltips
from rlhfreports.paper import COMPLETION_LEN, FIGURE_2, PROMPT_LEN, TABLE_1, TABLES, alike, of_a_rank

_ROW_PX, _MAX_CHART_PX = 22, 1600


def answer_section(page: Page) -> Section:
    """The differences of several runs, then three sentences on each, from its records, and the gains behind them."""
    several = len(page.runs) > 1
    sentences = comparison_sentences(page.frame, compared(page.frame)) if several else answer(page.runs[0].frame)
    blocks: list[Block] = [Text(text=sentence, kind="answer") for sentence in sentences]
    for run in page.runs if several else ():
        blocks.append(Text(text=f"{run.name}: {' '.join(answer(run.frame))}"))
    chart = None if several else costs_chart(page.frame)
    blocks += [chart] if chart else []
    for i, run in enumerate(page.runs):
        if len(run.frame) and has_gain(run.frame):
            gains = gain_table(run.frame)
            caption = f"Gain {gains.caption}{f', {run.name}' if several else ''}"
            blocks.append(table_of(gains, name=f"gain-{i}", caption=caption, is_folded=True, filters=("method",)))
    return Section(id="answer", title="The answer", blocks=blocks)


def comparison_section(page: Page) -> Section | None:
    """The cases of the first run against those of each other one; ``None`` where they share none."""
    if len(page.runs) < 2:
        return None
    found = compared(page.frame)
    if found.empty:
        return None
    timed = found[found["speedup"].notna()]
    filters = ("method", "size", "run", "verdict")
    table = table_of(comparison_table(found), name="comparison-table", filters=filters)
    blocks: list[Block] = [*([_speedup_chart(page, timed)] if len(timed) else []), table]
    return Section(id="comparison", title=f"Against {page.runs[0].name}", blocks=blocks)


def _speedup_chart(page: Page, timed: pd.DataFrame) -> Chart:
    caption = (
        f"Seconds of {page.runs[0].name} over seconds of the other run, case by case, with 95 % intervals: to the "
        "right of 1 the other run is faster. An interval that crosses 1 carries no difference."
    )
    colors, shapes = method_scales(page.frame)
    runs = list(dict.fromkeys(timed["other_run"]))
    base = (
        alt.Chart(alt.NamedData("speedups"))
        .transform_filter("datum.other_run === other")
        .encode(
            y=alt.Y("size:N", title=None, sort=None, axis=names_axis()),
            yOffset=alt.YOffset("title:N"),
            color=alt.Color("title:N", scale=colors),
        )
    )
    x = alt.X("speedup:Q", title="speed-up", scale=alt.Scale(type="log", nice=False, padding=20))
    dots = base.mark_point(filled=True, size=55, opacity=1).encode(
        x=x,
        shape=alt.Shape("title:N", scale=shapes),
        tooltip=tooltips("case", "speedup", "low", "high", "machines"),
    )
    ends = base.mark_rule().encode(x=alt.X("low:Q", title="speed-up"), x2="high:Q")
    one = alt.Chart(alt.NamedData("one")).mark_rule(strokeDash=[4, 3]).encode(x=alt.X("one:Q"))
    num_rows = int(timed.groupby("other_run").size().max()) + timed["size"].nunique()
    layers = [one, *([ends] if timed["low"].notna().any() else []), dots]
    made = alt.layer(*layers).add_params(select("other", runs, "run"))
    return Chart(
        id="speedup",
        title="Speed-up of every case",
        caption=caption,
        spec=specification(made.properties(height=min(_ROW_PX * num_rows, _MAX_CHART_PX)), description=caption),
        data={"speedups": timed, "one": pd.DataFrame({"one": [1.0]})},
    )


def paper_section(page: Page) -> Section | None:
    """The papers' tables beside the first run; ``None`` where the papers were not asked for."""
    if not page.with_paper:
        return None
    run = page.runs[0]
    blocks: list[Block] = []
    for i, make in enumerate(TABLES):
        made = make(run.frame)
        if len(made.cells):
            blocks.append(table_of(made, name=f"paper-{i}"))
    points = frames.times(of_a_rank(alike(run.frame)))
    blocks += [_figure_2(page, points)] if len(points) else []
    of_run = f", {run.name}" if len(page.runs) > 1 else ""
    return Section(id="paper", title=f"Comparison with the papers{of_run}", blocks=blocks)


def _figure_2(page: Page, points: pd.DataFrame) -> Chart:
    """Total seconds per sample at the largest batch of each length, with the paper's points."""
    total = points[points["kind"] == "total"].sort_values("batch_size", kind="stable")
    ours = total.drop_duplicates(["line", "seq_len"], keep="last")
    titles = dict(zip(page.frame["method"], page.frame["method_title"], strict=True))
    paper = pd.DataFrame(
        [
            {
                "title": titles[row.method],
                "seq_len": PROMPT_LEN + COMPLETION_LEN,
                "batch_size": row.batch_size,
                "seconds": row.total_s,
            }
            for row in TABLE_1
            if row.total_s is not None and row.method in titles
        ],
        columns=["title", "seq_len", "batch_size", "seconds"],
    )
    colors, shapes = method_scales(page.frame)
    log = alt.Scale(type="log", nice=False, padding=20)

    def base(source: str) -> alt.Chart:
        return alt.Chart(alt.NamedData(source)).encode(
            x=alt.X("seq_len:Q", title=LENGTH_TITLE, scale=log, axis=alt.Axis(format="d")),
            y=alt.Y("seconds:Q", title=None, scale=log),
            color=alt.Color("title:N", scale=colors),
            shape=alt.Shape("title:N", scale=shapes),
            tooltip=tooltips("title", "seq_len", "batch_size", "seconds", seconds="seconds per sample"),
        )

    line = base("figure-2").encode(detail="line:N", shape=alt.Undefined).mark_line(strokeWidth=2)
    dots = base("figure-2").mark_point(filled=True, size=70, opacity=1)
    hollow = base("figure-2-paper").mark_point(filled=False, size=110, strokeWidth=2)
    layers = [line, dots, *([hollow] if len(paper) else [])]
    return Chart(
        id="figure-2",
        title="Seconds per sample at the largest batch",
        caption=FIGURE_2,
        spec=specification(
            alt.layer(*layers).properties(height=HEIGHT), description=FIGURE_2, title="seconds per sample"
        ),
        data={"figure-2": ours} | ({"figure-2-paper": paper} if len(paper) else {}),
    )
