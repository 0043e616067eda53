"""Renders the page: sections through a template, with the libraries inlined."""

from __future__ import annotations

import base64
import dataclasses
import functools
import gzip
import importlib.resources
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import vl_convert
from markupsafe import Markup

from rlhfreports.columns import shared_axes_text
from rlhfreports.page.blocks import Chart, Section, Table
from rlhfreports.page.configuration import facts
from rlhfreports.page.data import Page
from rlhfreports.page.sections import sections_of

_EXPORTS = "window.vegaEmbed = vegaEmbed;"  # what the page's script uses of the bundle
_DIGITS = 6  # of a number in the data of a chart


def write_page(page: Page, path: str | Path) -> Path:
    """Writes the page to ``path``, at once or not at all, and returns it.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # A path in a command may be no UTF-8; Python keeps its bytes as lone surrogates, which UTF-8 cannot hold.
        written.write_text(page_html(page), encoding="utf-8", errors="replace")
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)
    return path


def page_html(page: Page) -> str:
    """The page as text."""
    several = len(page.runs) > 1
    about = [f"{run.name}: {facts(run)}" if several else facts(run) for run in page.runs]
    captions = [text for text in (shared_axes_text(page.frame), *about) if text]
    return rendered(", ".join(run.name for run in page.runs), captions, sections_of(page))


def rendered(title: str, captions: Sequence[str], sections: Sequence[Section]) -> str:
    """The page of these sections. All text in them is escaped, in JSON too.

    Args:
        title: of the page.
        captions: lines below the title.
        sections: the contents.
    """
    charts = [block for section in sections for block in section.blocks if isinstance(block, Chart)]
    data = {name: columns_of(frame) for chart in charts for name, frame in chart.data.items()}
    specs = {chart.id: {"spec": chart.spec, "data": list(chart.data)} for chart in charts}
    tables = [block for section in sections for block in section.blocks if isinstance(block, Table)]
    files = {table.id: [dataclasses.asdict(file) for file in table.downloads] for table in tables}
    return (
        _environment()
        .get_template("page.html")
        .render(title=title, captions=captions, sections=sections, data=data, specs=specs, files=files, **_libraries())
    )


def columns_of(frame: pd.DataFrame) -> dict[str, Any]:
    """The columns of ``frame`` as JSON: numbers with six significant digits, ``None`` for absent and infinite ones.

    A column with few different values is ``{"values": [...], "codes": [...]}``: with it and a shorter CSV, the page of
    1,000 cases has 4.7 MB and not 10.5.
    """
    return {str(name): _column([_json(value) for value in frame[name].tolist()]) for name in frame.columns}


def _column(values: list[Any]) -> list[Any] | dict[str, list[Any]]:
    places: dict[Any, int] = {}
    codes = [places.setdefault((type(value), value), len(places)) for value in values if not isinstance(value, list)]
    if len(codes) < len(values) or 2 * len(places) > len(values):
        return values
    return {"values": [value for _, value in places], "codes": codes}


def _json(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    if pd.isna(value):
        return None
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value


# Characters that turn the direction of the text behind them, also of text that is not a record's.
_TURNS = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\N{REPLACEMENT CHARACTER}")


def _in_one_direction(value: Any) -> Any:
    return value.translate(_TURNS) if type(value) is str else value


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rlhfreports.page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_in_one_direction,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment


@functools.cache
def _libraries() -> dict[str, Markup]:
    """Vega, DataTables and the page's own style and script, as the template names them."""
    tables = importlib.resources.files("itables") / "html"
    own = importlib.resources.files("rlhfreports.page") / "templates"
    scripts = {
        "vega_js": vl_convert.javascript_bundle(_EXPORTS),
        "tables_js": (tables / "dt_bundle.js").read_text(encoding="utf-8"),
    }
    found = {
        "tables_css": (tables / "dt_bundle.css").read_text(encoding="utf-8"),
        "page_js": (own / "page.js").read_text(encoding="utf-8"),
        "page_css": (own / "page.css").read_text(encoding="utf-8"),
    }
    # A backslash before these characters changes no string of JavaScript or CSS, but hides tags from the HTML parser.
    escaped = {
        name: re.sub(r"<(?=/script|/style|!--)", r"<\\", text, flags=re.IGNORECASE) for name, text in found.items()
    }
    # Packed, a page has 0.6 MB of libraries and not 1.9. Browsers unpack them since 2023.
    packed = {name: base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode() for name, text in scripts.items()}
    return {name: Markup(text) for name, text in (escaped | packed).items()}
