"""The common parts of all charts: colours in light and dark, their configuration, and the step to a specification.

A chart names its data sources (``alt.NamedData``) and gives the type of every field, as Altair cannot see the data.
The signal ``dark`` is true in dark mode: the page sets it. Colours that need it are expressions of it, so a change of
mode or a print is a change of one signal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from rlhfreports.columns import RUN, axes_that_vary, parts_of, setting_order
from rlhfreports.frames import line_of
from rlhfreports.plans import part_colors
from rlhfreports.styles import COLORS, MARKERS, method_styles

HEIGHT = 340
NUMBER = ",.3~r"  # of an axis: plain, with three significant digits
LENGTH_TITLE = "sequence length (tokens)"
WORDS_ROOM = "max(width - 150, width / 3)"  # of bars whose words stand right of them
DASHES = ([1, 0], [6, 4], [2, 3], [10, 3, 2, 3])
# Vega's symbols for matplotlib's markers.
SYMBOLS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "P": "cross",
    "X": "M-1,-1L1,1M1,-1L-1,1",
    "*": "M0,-1L.29,-.4L.95,-.31L.48,.15L.59,.81L0,.5L-.59,.81L-.48,.15L-.95,-.31L-.29,-.4Z",
    "<": "triangle-left",
    ">": "triangle-right",
    "p": "M0,-1L.95,-.31L.59,.81L-.59,.81L-.95,-.31Z",
    "h": "M0,-1L.87,-.5L.87,.5L0,1L-.87,.5L-.87,-.5Z",
}
# In dark mode, in place of the colours that are too dark there.
DARK = dict(zip(COLORS, COLORS, strict=True)) | {
    "#000000": "#FFFFFF",
    "#0072B2": "#3D9BE0",
    "#660022": "#FF8FA8",
    "#000099": "#8A8AFF",
    "#555500": "#B5B545",
}
_INK, _FAINT = ("#333333", "#DDDDDD"), ("#E4E4E4", "#3A3F44")  # light, dark


def by_mode(light: str, dark: str) -> Any:
    """A colour that depends on the mode."""
    return light if light == dark else {"expr": f"dark ? '{dark}' : '{light}'"}


def _config() -> dict[str, Any]:
    ink, faint = by_mode(*_INK), by_mode(*_FAINT)
    words = {"labelColor": ink, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 12}
    return {
        "background": "transparent",
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "axis": {**words, "gridColor": faint, "domainColor": faint, "tickColor": faint, "titleFontWeight": "normal"},
        # As many ticks as have room: Vega's own number made a grid of 20 lines, and labels that touch on log axes.
        "axisX": {"tickCount": {"expr": "clamp(floor((containerSize()[0] || 900) / 110), 3, 10)"}},
        "axisY": {"tickCount": {"expr": "clamp(floor(height / 45), 3, 8)"}},
        "legend": {
            **words,
            "orient": "top",
            "columns": {"expr": "clamp(floor((containerSize()[0] || 900) / 170), 1, 6)"},
            "layout": {"top": {"direction": "vertical", "anchor": "start"}},
            "labelLimit": 320,
            "title": None,
        },
        "header": words,
        "title": {"color": ink},
        "text": {"color": ink, "fontSize": 12},
        "rule": {"color": ink},
    }


def method_scales(frame: pd.DataFrame) -> tuple[alt.Scale, alt.Scale]:
    """The scales from a method's title to its colour and to its symbol, those of the static pictures."""
    styles = list(method_styles(frame).values())
    titles = [style.title for style in styles]
    colors = [by_mode(style.color, DARK[style.color]) for style in styles]
    shapes = [SYMBOLS[style.marker] for style in styles]
    return alt.Scale(domain=titles, range=colors), alt.Scale(domain=titles, range=shapes)


def part_color(frame: pd.DataFrame, offset: int = 18) -> alt.Color:
    """The encoding of parts, whose names are short: their legend takes one row where there is room.

    Args:
        frame: has the parts.
        offset: pixels between the legend and the chart.
    """
    columns = {"expr": "clamp(floor((containerSize()[0] || 900) / 110), 2, 11)"}
    return alt.Color("part:N", scale=part_scale(frame), legend=alt.Legend(columns=columns, offset=offset))


def part_scale(frame: pd.DataFrame) -> alt.Scale:
    """The scale from a part of memory to its colour, that of the static pictures."""
    parts = parts_of(frame)
    return alt.Scale(
        domain=[part.replace("_", " ") for part in parts],
        range=[by_mode(color, DARK.get(color, color)) for color in part_colors(parts)],
    )


def lines_in_order(frame: pd.DataFrame) -> list[str]:
    """The lines of ``frame`` (``frames.line_of``) in the order of methods, settings and runs."""
    rows = frame.assign(_line=line_of(frame)).drop_duplicates("_line")
    places = {setting: place for place, setting in enumerate(setting_order(frame))}
    rows = rows.assign(_setting=rows["setting"].map(places))
    return rows.sort_values(["method_order", "_setting"], kind="stable", na_position="last")["_line"].tolist()


def line_dash(frame: pd.DataFrame) -> dict[str, Any]:
    """The encoding of dashes: by run where there are several, else by setting; none where neither varies."""
    varying = [axis for axis in (RUN, "setting") if axis in axes_that_vary(frame)][:1]
    if not varying:
        return {}
    values = list(dict.fromkeys(frame[varying[0]].astype(str)))
    scale = alt.Scale(domain=values, range=[DASHES[i % len(DASHES)] for i in range(len(values))])
    return {"strokeDash": alt.StrokeDash(f"{varying[0]}:N", scale=scale, legend=alt.Legend(symbolType="stroke"))}


def legend_filter() -> alt.Parameter:
    """The methods that a reader chose in the legend; all where none is chosen."""
    return alt.selection_point(name="shown", fields=["title"], bind="legend")


def names_axis(most_px: int = 260) -> alt.Axis:
    """The axis of names of lines: in a narrow window they take two fifths of it, and are cut."""
    return alt.Axis(labelLimit=alt.ExprRef(f"min({most_px}, (containerSize()[0] || 900) * 0.4)"))


def select(name: str, options: Sequence[str], label: str, value: str | None = None) -> alt.Parameter:
    """A switch of ``options``: a list, or buttons where they are few and short."""
    few = len(options) <= 4 and sum(map(len, options)) <= 60
    bind = alt.binding_radio if few else alt.binding_select
    return alt.param(name=name, value=value or options[0], bind=bind(options=list(options), name=f"{label}: "))


def length_axis(lengths: Sequence[int]) -> alt.X:
    """The logarithmic axis of sequence lengths, with a tick at each; a single length stands in the middle."""
    low, high = (lengths[0], lengths[-1]) if len(lengths) > 1 else (lengths[0] / 2, lengths[0] * 2)
    return alt.X(
        "seq_len:Q",
        title=LENGTH_TITLE,
        scale=alt.Scale(type="log", nice=False, padding=24, domain=[low, high]),
        axis=alt.Axis(values=list(lengths), labelOverlap=True, format="d"),
    )


def by_size(rows: pd.DataFrame, size: str = "size", line: str = "line") -> tuple[list[str], str, int]:
    """The sizes to choose from, the last of those with the most lines, and how many lines that has."""
    counts = rows.groupby(size, sort=False)[line].nunique()
    return list(counts.index), str(counts[counts == counts.max()].index[-1]), int(counts.max())


def specification(chart: Any, *, description: str, title: Any = None) -> dict[str, Any]:
    """``chart`` as a Vega-Lite specification with the look of the page. Altair checks it against the schema.

    Args:
        chart: a chart or layers of charts. It takes the width of its container.
        description: what screen readers say.
        title: the words above its y axis; an expression where a switch changes them.
    """
    made = chart.properties(width="container", autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    spec: dict[str, Any] = made.to_dict()
    spec["params"] = [{"name": "dark", "value": False}, *spec.get("params", [])]
    spec["config"] = _config()
    spec["description"] = description
    if title is not None:
        spec["title"] = {"text": title, "anchor": "start", "fontSize": 12, "fontWeight": "normal", "offset": 8}
    return spec


assert set(SYMBOLS) == set(MARKERS)
