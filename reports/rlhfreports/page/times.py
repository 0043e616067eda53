"""The section of latency and throughput against sequence length."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from rlhfreports import frames
from rlhfreports.columns import time_notes
from rlhfreports.page.blocks import Block, Chart, Section, Text, table_of
from rlhfreports.page.charts import (
    HEIGHT,
    NUMBER,
    WORDS_ROOM,
    legend_filter,
    length_axis,
    line_dash,
    lines_in_order,
    method_scales,
    names_axis,
    select,
    specification,
)
from rlhfreports.page.data import Page
from rlhfreports.page.tooltips import tooltips
from rlhfreports.slopes import slope_cells, slope_table
from rlhfreports.tables import outcome_word

# What the y axis shows, by the option of the switch: an expression of one row's seconds.
MEASURES = {
    "seconds per sample": "{}",
    "seconds per token": "{} / datum.tokens",
    "samples per second": "1 / {}",
    "tokens per second": "datum.tokens / {}",
}
# The slope of a measure from that of seconds per sample: its factor, and what is added. The tokens of a line's samples
# are in proportion to the length.
_SLOPES = {
    "seconds per sample": (1, 0),
    "seconds per token": (1, -1),
    "samples per second": (-1, 0),
    "tokens per second": (-1, 1),
}
_CAPTION = (
    "One line a method, both axes logarithmic, 95 % intervals as bands and bars. The legend has the slope of each line "
    "for the measure shown: a time per sample in proportion to the length has 1, a throughput per token that no length "
    "changes has 0. A click on a method in the legend shows it alone."
)
_UNMEASURED = " A word at the top marks a length that was not measured, such as OOM."
_ONE_LENGTH = "One bar a method, with its 95 % interval where several blocks were timed."
_NO_BAR = " A method that was not measured has its outcome in place of a bar."
_BAR_PX, _CHAR_PX = 30, 6
_ROW_PX, _MAX_ROWS = 13, 6  # of the words at the top, and how many of them lines never cross


def times_section(page: Page) -> Section | None:
    """Seconds per sample and throughput against sequence length, both axes logarithmic."""
    points, failed = frames.times(page.frame), frames.failures(page.frame)
    if points.empty:
        return None
    blocks: list[Block] = [Text(text=note, kind="warning") for note in time_notes(page.frame)]
    both = pd.concat([rows[["panel", "seq_len"]] for rows in (points, failed)])
    has_lengths = bool((both.groupby("panel")["seq_len"].nunique() > 1).any())
    blocks.append((latency_chart if has_lengths else one_length_chart)(page, points, failed))
    for run in page.runs:
        slopes = slope_table(run.frame)
        if len(slopes.frame):
            name = f"slopes-{page.runs.index(run)}"
            caption = "Slopes of log time against log size" + (f", {run.name}" if len(page.runs) > 1 else "")
            blocks.append(table_of(slopes, name=name, caption=caption, is_folded=True, filters=("method", "time")))
    blocks.append(Text(text=_tokens_line(page.frame)))
    return Section(id="times", title="Time and throughput", blocks=blocks)


def _tokens_line(frame: pd.DataFrame) -> str:
    several = frame.loc[frame["sequences_per_sample"] > 1, "method_title"].dropna().unique()
    line = "A sample is a data row of the batch; its tokens are prompt and completion"
    return f"{line}, of each of its sequences for {', '.join(several)}." if len(several) else f"{line}."


def slope_texts(frame: pd.DataFrame) -> dict[str, str]:
    """The slope of every line for the legend, by ``panel|kind|measure|title``.

    Where a title has several lines in a panel, such as those of two settings, it has a slope for each, in their order.
    """
    found: dict[str, list[str]] = {}
    for row in frames.slopes(frame).to_dict("records"):
        half_width = None if pd.isna(row["half_width"]) else float(row["half_width"])
        for measure, (factor, added) in _SLOPES.items():
            slope = factor * row["slope"] + added
            key = f"{row['panel']}|{row['kind']}|{measure}|{row['title']}"
            found.setdefault(key, []).append(" ± ".join(filter(None, slope_cells(slope, half_width))))
    return {key: f"slope {' and '.join(slopes)}" for key, slopes in found.items()}


def latency_chart(page: Page, points: pd.DataFrame, failed: pd.DataFrame) -> Chart:
    """Time against length; the switches choose the panel, the kind of phases and the measure."""
    words = _words(failed)
    x = length_axis(sorted({int(length) for rows in (points, failed) for length in rows["seq_len"]}))
    shown, dash = legend_filter(), line_dash(page.frame)
    colors, shapes = method_scales(page.frame)
    slopes = slope_texts(page.frame)
    slope = "slopes[panel + '|' + kind + '|' + measure + '|' + datum.label]"
    longest = max(len(key.rpartition("|")[2] + text) for key, text in [*slopes.items(), ("", "")])
    # Wider than other legends: a method stands there with the slope of each of its lines.
    legend = alt.Legend(
        labelExpr=f"datum.label + ({slope} ? '  (' + {slope} + ')' : '')",
        columns={"expr": f"clamp(floor((containerSize()[0] || 900) / {_CHAR_PX * longest + 60}), 1, 4)"},
        labelLimit=0,
    )
    base = _chosen().encode(x=x, color=alt.Color("title:N", scale=colors, legend=legend), detail="line:N")
    room = 16 + _ROW_PX * min(1 + int(words["row"].max()), _MAX_ROWS) if len(words) else 16
    y: dict[str, Any] = {
        "scale": alt.Scale(type="log", nice=False, padding=room),
        "title": None,
        "axis": alt.Axis(format=NUMBER),
    }
    faded = alt.condition(shown, alt.value(1), alt.value(0.08))
    # Of all lines at once the bands are faint: five opaque ones are a single brown area.
    chosen = alt.when(alt.ParameterPredicate(param="shown", empty=False)).then(alt.value(0.25))
    band = base.mark_area(strokeOpacity=0).encode(
        y=alt.Y("low:Q", **y),
        y2="high:Q",
        fillOpacity=chosen.when(alt.ParameterPredicate(param="shown")).then(alt.value(0.08)).otherwise(alt.value(0)),
    )
    rule = base.mark_rule(strokeWidth=1.2).encode(y=alt.Y("low:Q", **y), y2="high:Q", opacity=faded)
    line = base.mark_line(strokeWidth=2).encode(y=alt.Y("seconds:Q", **y), opacity=faded, **dash)
    dots = base.mark_point(filled=True, size=70, opacity=1).encode(
        y=alt.Y("seconds:Q", **y),
        shape=alt.Shape("title:N", scale=shapes),
        opacity=faded,
        tooltip=tooltips("line", "seq_len", "batch_size", "shown"),
    )
    marks = _failures(dy={"expr": f"datum.row * {_ROW_PX}"}).encode(
        x=x,
        y=alt.value(_ROW_PX / 2),
        color=alt.Color("title:N", scale=colors, legend=legend),
        opacity=faded,
    )
    switches = [*_switches(page, points), alt.param(name="slopes", value=slopes)]
    layers = [band, rule, line, dots, *([marks] if len(words) else [])]
    made = alt.layer(*layers).add_params(*switches, shown).properties(height=HEIGHT)
    return _chart("Time against sequence length", _CAPTION, _UNMEASURED, made, points, words)


def one_length_chart(page: Page, points: pd.DataFrame, failed: pd.DataFrame) -> Chart:
    """Time where each panel has one length, a bar a method; the switches are those of ``latency_chart``."""
    words = _words(failed)
    colors, _ = method_scales(page.frame)
    y = alt.Y("line:N", title=None, sort=lines_in_order(page.frame), axis=names_axis())
    lengths = sorted({*points["seq_len"], *words["seq_len"]})
    numbers = "datum.shown + (datum.shows_batch ? ', batch ' + datum.batch_size : '')"
    numbers += " + ', ' + datum.seq_len + ' tokens'" if len(lengths) > 1 else ""
    base = _chosen().transform_calculate(words=numbers).encode(y=y)
    scale = alt.Scale(zero=True, nice=False, range=[0, alt.ExprRef(WORDS_ROOM)])
    bars = base.mark_bar().encode(
        x=alt.X("seconds:Q", title=None, scale=scale, axis=alt.Axis(format=NUMBER)),
        color=alt.Color("title:N", scale=colors, legend=None),
        tooltip=tooltips("line", "seq_len", "batch_size", "shown"),
    )
    rule = base.mark_rule(strokeWidth=1.5, color="#888888").encode(x=alt.X("low:Q", title=None), x2="high:Q")
    ends = base.transform_calculate(end="max(datum.low, datum.high)")  # of a throughput the upper end is ``low``
    texts = ends.mark_text(align="left", dx=6).encode(x=alt.X("end:Q", title=None), text="words:N")
    marks = _failures(align="left", dx=5).encode(y=y, x=alt.datum(0))
    layers = [bars, rule, texts, *([marks] if len(words) else [])]
    height = _BAR_PX * len({*points["line"], *words["line"]})
    made = alt.layer(*layers).add_params(*_switches(page, points)).properties(height=height)
    title = f"Time at {lengths[0]} tokens" if len(lengths) == 1 else "Time of each method"
    return _chart(title, _ONE_LENGTH, _NO_BAR, made, points, words)


def _words(failed: pd.DataFrame) -> pd.DataFrame:
    """The cases that were not measured, with a ``word`` each, and the ``row`` of its line."""
    return failed.assign(
        word=[outcome_word(o) if o != "ok" else "no time" for o in failed["outcome"]],
        row=failed.groupby("panel")["line"].transform(lambda lines: pd.factorize(lines)[0]) if len(failed) else [],
    )


def _chosen() -> alt.Chart:
    """The points that the switches choose, with the values of the measure, and these as text (``shown``)."""
    return (
        alt.Chart(alt.NamedData("times"))
        .transform_filter("datum.panel === panel && datum.kind === kind")
        # Of the seconds, before they become a throughput: ``low`` is cut for the logarithmic axis, ``high`` is not.
        .transform_calculate(relative="(datum.high - datum.seconds) / datum.seconds")
        .transform_calculate(
            **{name: _measured(name) for name in ("seconds", "low", "high")},
        )
        .transform_calculate(half="datum.relative * datum.seconds")
        .transform_calculate(digits="datum.half > 0 ? floor(log(datum.half) / LN10) : 0")
        .transform_calculate(decimals="max(0, (datum.half < 2 * pow(10, datum.digits) ? 1 : 0) - datum.digits)")
        .transform_calculate(
            shown="datum.half > 0 ? format(datum.seconds, '.' + datum.decimals + 'f') + ' ± ' + "
            "format(datum.half, '.' + datum.decimals + 'f') : format(datum.seconds, '.3~g')"
        )
    )


def _failures(**mark: Any) -> Any:
    return (
        alt.Chart(alt.NamedData("failures"))
        .transform_filter("datum.panel === panel")
        .mark_text(fontSize=10, fontWeight="bold", **mark)
        .encode(text="word:N", tooltip=tooltips("line", "seq_len", "word", "error"))
    )


def _switches(page: Page, points: pd.DataFrame) -> list[alt.Parameter]:
    kinds = [kind for kind in frames.KINDS if (points["kind"] == kind).any()]
    return [
        select("panel", frames.panel_titles(page.frame), "cases"),
        select("kind", kinds, "part of the step"),
        select("measure", list(MEASURES), "measure"),
    ]


def _chart(title: str, caption: str, of_failures: str, made: Any, points: pd.DataFrame, words: pd.DataFrame) -> Chart:
    caption += of_failures if len(words) else ""
    return Chart(
        id="latency",
        title=title,
        caption=caption,
        spec=specification(made, description=caption, title={"expr": "measure"}),
        data={"times": points} | ({"failures": words} if len(words) else {}),
    )


def _measured(name: str) -> str:
    """The expression of a measure, of ``seconds`` or of an end of its interval."""
    found = "NaN"
    for measure, expression in MEASURES.items():
        found = f"measure === '{measure}' ? {expression.format(f'datum.{name}')} : {found}"
    return found
