"""The blocks that sections are made of. The template has one macro for each."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pandas as pd

from rlhfreports.tables import ReportTable, markdown


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A paragraph.

    Attributes:
        text: its words. They are escaped.
        kind: ``""``, ``"answer"`` or ``"warning"``.
    """

    macro: ClassVar[str] = "text"
    text: str
    kind: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Items:
    """A list of sentences, folded behind ``title`` where that is given."""

    macro: ClassVar[str] = "items"
    items: Sequence[str]
    title: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """Preformatted text, folded behind ``title``."""

    macro: ClassVar[str] = "code"
    title: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A Vega-Lite chart.

    Attributes:
        id: its id in the page.
        title: the heading above it.
        caption: what the reader sees and may do, below it; also its description for screen readers.
        spec: the specification, with named data sources; see ``rlhfreports.page.charts.chart``.
        data: the rows of these sources. Charts may share one by its name.
    """

    macro: ClassVar[str] = "chart"
    id: str
    title: str
    caption: str
    spec: Mapping[str, Any]
    data: Mapping[str, pd.DataFrame]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A cell of a table: its text, and the number that it is sorted by."""

    text: str
    order: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Download:
    """A table as a file, in pieces: the page writes those of the rows that are shown.

    Attributes:
        name: of the file.
        title: of its button.
        media_type: of the file.
        head: what comes before the rows.
        rows: the text of each row of the table, with its line end.
        foot: what comes after them.
    """

    name: str
    title: str
    media_type: str
    head: str
    rows: Sequence[str]
    foot: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table that can be sorted and filtered.

    Attributes:
        id: its id in the page, and the name of its downloads.
        caption: the sentence above it.
        headings: of the columns.
        rows: their cells.
        titles: for each row what a pointer over it shows, empty for most; empty where no row has any.
        kinds: for each row ``failed``, ``warned`` or nothing; empty where no row is.
        num_text_columns: columns of words, from the left. The others are numbers.
        filters: headings of columns that have a list of their values to choose from.
        downloads: the table as files.
        note: the paragraph below it.
        is_folded: it is folded behind its caption.
    """

    macro: ClassVar[str] = "table"
    id: str
    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    titles: Sequence[str] = ()
    kinds: Sequence[str] = ()
    num_text_columns: int
    filters: Sequence[str] = ()
    downloads: Sequence[Download] = ()
    note: str = ""
    is_folded: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A link to a file beside the page."""

    text: str
    url: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """Links to files beside the page, folded behind ``title``, with a sentence above."""

    macro: ClassVar[str] = "links"
    title: str
    text: str
    links: Sequence[Link]


_NUMBER = re.compile(r"[<≥]?([+-]?\d[\d,]*\.?\d*(?:e[+-]\d+)?)")
Block = Text | Items | Code | Chart | Table | Links


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A section of the page.

    Attributes:
        id: its anchor.
        title: its heading.
        blocks: its contents.
    """

    id: str
    title: str
    blocks: Sequence[Block]


def downloads(name: str, cells: pd.DataFrame, num_text_columns: int, text: str) -> tuple[Download, ...]:
    """The same table as CSV (``text``, with a row for each of ``cells``), Markdown and LaTeX."""
    lines = csv.reader(io.StringIO(text))  # a cell may have line ends
    head, *rows = [_csv_line(line) for line in lines]
    plain = cells.map(lambda cell: str(cell).replace("\n", " "))
    alignment = "l" * num_text_columns + "r" * (len(cells.columns) - num_text_columns)
    latex = plain.to_latex(index=False, escape=True, column_format=alignment)
    in_latex = latex.splitlines().index("\\midrule") + 1 if len(cells) else 0
    return (
        Download(name=f"{name}.csv", title="CSV", media_type="text/csv", head=head, rows=rows),
        _in_lines(f"{name}.md", "Markdown", "text/markdown", markdown(plain, num_text_columns), 2, len(cells)),
        _in_lines(f"{name}.tex", "LaTeX", "application/x-tex", latex, in_latex, len(cells)),
    )


def _csv_line(values: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def _in_lines(name: str, title: str, media_type: str, text: str, num_before: int, num_rows: int) -> Download:
    """A file of which each row is one line, after ``num_before`` lines."""
    lines = text.splitlines(keepends=True)
    end = num_before + num_rows
    return Download(
        name=name,
        title=title,
        media_type=media_type,
        head="".join(lines[:num_before]),
        rows=lines[num_before:end],
        foot="".join(lines[end:]),
    )


def table_of(
    table: ReportTable,
    *,
    name: str,
    caption: str = "",
    is_folded: bool = False,
    orders: Mapping[str, Sequence[float | None]] | None = None,
    titles: Sequence[str] = (),
    kinds: Sequence[str] = (),
    filters: Sequence[str] = (),
) -> Table:
    """A table of the page from one of the reports.

    Args:
        table: the table.
        name: its id.
        caption: see ``Table``; by default that of ``table``.
        is_folded: see ``Table``.
        orders: the numbers that columns are sorted by; other columns of numbers are sorted by what their text begins
            with.
        titles: see ``Table``; empty for none.
        kinds: see ``Table``; empty for none.
        filters: see ``Table``.
    """
    numbers = table.headings[table.num_text_columns :]
    orders = {name: [_leading_number(text) for text in table.cells[name]] for name in numbers} | dict(orders or {})
    columns = [
        [
            Cell(text=str(text), order=orders[heading][i] if heading in orders else None)
            for i, text in enumerate(table.cells[heading])
        ]
        for heading in table.headings
    ]
    return Table(
        id=name,
        caption=caption or table.caption,
        note=table.explanation,
        is_folded=is_folded,
        headings=table.headings,
        rows=list(zip(*columns, strict=True)),
        titles=titles,
        kinds=kinds,
        num_text_columns=table.num_text_columns,
        filters=filters,
        downloads=downloads(name, table.cells, table.num_text_columns, table.csv()),
    )


def _leading_number(text: object) -> float | None:
    """The number that a cell begins with: 1.26 of ``1.26x (1.21 to 1.31)``, 0.001 of ``<0.001``; ``None`` for none."""
    found = _NUMBER.match(str(text))
    return None if found is None else float(found[1].replace(",", ""))
