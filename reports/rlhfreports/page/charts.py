"""What all charts share: their colours in light and dark, their configuration, and the step to a specification.

A chart names its data sources (``alt.NamedData``) and gives the type of every field, as Altair cannot see the data.
The signal ``dark`` is true in dark mode: the page sets it. Colours that need it are expressions of it, so a change of
mode or a print is a change of one signal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from rlhfreports.plots import COLORS, MARKERS, method_styles

HEIGHT = 340
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
    words = {"labelColor": ink, "titleColor": ink}
    return {
        "background": "transparent",
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "axis": {**words, "gridColor": faint, "domainColor": faint, "tickColor": faint, "titleFontWeight": "normal"},
        "legend": {**words, "orient": "top", "columns": 4, "labelLimit": 320, "title": None},
        "header": words,
        "title": {"color": ink},
        "text": {"color": ink},
        "rule": {"color": ink},
    }


def method_scales(frame: pd.DataFrame) -> tuple[alt.Scale, alt.Scale]:
    """The scales from a method's title to its colour and to its symbol, those of the static pictures."""
    styles = list(method_styles(frame).values())
    titles = [style.title for style in styles]
    colors = [by_mode(style.color, DARK[style.color]) for style in styles]
    shapes = [SYMBOLS[style.marker] for style in styles]
    return alt.Scale(domain=titles, range=colors), alt.Scale(domain=titles, range=shapes)


def select(name: str, options: Sequence[str], label: str, value: str | None = None) -> alt.Parameter:
    """A switch of ``options``: a list, or buttons where they are few and short."""
    few = len(options) <= 4 and sum(map(len, options)) <= 60
    bind = alt.binding_radio if few else alt.binding_select
    return alt.param(name=name, value=value or options[0], bind=bind(options=list(options), name=f"{label}: "))


def specification(chart: Any, *, description: str) -> dict[str, Any]:
    """``chart`` as a Vega-Lite specification with the look of the page. Altair checks it against the schema.

    It takes the width of its container. Switches that layers declare stand at the top.
    """
    made = chart.properties(width="container", autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    spec: dict[str, Any] = made.to_dict()
    spec["params"] = [{"name": "dark", "value": False}, *spec.get("params", [])]
    spec["config"] = _config()
    spec["description"] = description
    return spec


assert set(SYMBOLS) == set(MARKERS)
