"""Layouts of a table for a width: which columns stand where, and how their headings and words are wrapped.

A table that is too wide gives way in this order, as far as it must:

1. headings are wrapped, then shortened, and the gap between columns is one blank
2. columns without a measured number (dashes, zeros, ``<0.001``) are left out
3. columns whose value several rows share become a line above these rows
4. words are wrapped
5. the table is divided into several, by group of columns, each with the columns that name the row, words wrapped last
6. rows become blocks of ``name: value``
"""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Iterator, Sequence

from rlhfreports.tables import ABSENT

_GAP, _NARROW_GAP = 2, 1
_MIN_WORD_CHARS = 10  # a column of words is not wrapped below this
_MAX_CELL_LINES = 3  # words that need more make blocks
_MAX_PAGES = 3  # a table that needs more becomes blocks
_MIN_PAGE_NUMBERS = 2  # columns of numbers on each page, at least


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        heading: the heading; lines are separated by line feeds.
        cells: one per row.
        short: the heading where space is scarce; ``heading`` by default.
        is_word: the column holds words and is aligned left. The first columns of words name the row.
        may_head: the column may become a line above the rows that share its value.
        group: columns of one group stay together when a table is divided.
    """

    heading: str
    cells: Sequence[str]
    short: str = ""
    is_word: bool = False
    may_head: bool = False
    group: int = 0

    @property
    def name(self) -> str:
        """The heading on one line."""
        return " ".join(self.heading.split())

    @property
    def is_empty(self) -> bool:
        """True if no cell holds a number above the smallest that can be shown."""
        return not self.is_word and all(not cell.strip("0.") or cell == ABSENT or cell[0] == "<" for cell in self.cells)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Columns in pages.

    Attributes:
        columns: those of the table.
        heads: what stands in a line above the rows that share it.
        left_out: what stands nowhere.
        gap: blanks between columns.
    """

    columns: tuple[Column, ...]
    heads: tuple[Column, ...] = ()
    left_out: tuple[Column, ...] = ()
    gap: int = _NARROW_GAP

    @property
    def width(self) -> int:
        """Columns of the terminal that it takes."""
        return sum(map(width_of, self.columns)) + self.gap * (len(self.columns) - 1)

    @property
    def num_lines(self) -> int:
        """The lines of its highest cell."""
        return max((1 + cell.count("\n") for column in self.columns for cell in column.cells), default=1)


def fitted(columns: tuple[Column, ...], width: int) -> tuple[Layout, list[tuple[Column, ...]]]:
    """The first layout that fits ``width``, with its pages: one table, several, or none for blocks."""
    layouts = list(_layouts(columns, width))
    if layouts[-1].num_lines > _MAX_CELL_LINES:
        layouts.pop()
    for layout in layouts:
        if layout.width <= width:
            return layout, [layout.columns]
    for layout in layouts[-2:]:  # words as they are, then wrapped
        if pages := _pages(layout, width):
            return layout, pages
    full = tuple(column for column in columns if not column.is_empty)
    return Layout(columns=full, left_out=layouts[-1].left_out), []


def _layouts(whole: tuple[Column, ...], width: int) -> Iterator[Layout]:
    yield Layout(columns=whole, gap=_GAP)
    yield Layout(columns=whole)
    yield Layout(columns=tuple(map(_wrapped_heading, whole)), gap=_GAP)
    short = tuple(map(_short_heading, whole))
    yield Layout(columns=short, gap=_GAP)
    yield Layout(columns=short)
    empty = tuple(column for column in whole if column.is_empty)
    short = tuple(column for column in short if not column.is_empty)
    yield Layout(columns=short, left_out=empty)
    heads = tuple(column for column in whole if column.may_head)
    if heads and len(sections(heads)) < num_rows(whole):
        short = tuple(column for column in short if not column.may_head)
        yield Layout(columns=short, heads=heads, left_out=empty)
    else:
        heads = ()
    yield Layout(columns=_wrapped_words(short, width), heads=heads, left_out=empty)


def _chars(text: str) -> int:
    """The widest line of ``text`` in columns of a terminal."""
    from rich.cells import cell_len

    return max(map(cell_len, text.split("\n")))


def width_of(column: Column) -> int:
    """Columns of the terminal that a column of the table takes."""
    return max(map(_chars, (column.heading, *column.cells)))


def leading_words(columns: tuple[Column, ...]) -> tuple[Column, ...]:
    """The columns that name the row."""
    return tuple(itertools.takewhile(lambda column: column.is_word, columns))


def _wrapped_heading(column: Column) -> Column:
    """The column with its heading wrapped to the width of its cells, or of the heading's longest word."""
    width = max(map(_chars, (*column.cells, *column.heading.split())), default=1)
    lines = [part for line in column.heading.split("\n") for part in textwrap.wrap(line, width)]
    return dataclasses.replace(column, heading="\n".join(lines))


def _short_heading(column: Column) -> Column:
    return _wrapped_heading(dataclasses.replace(column, heading=column.short or column.heading))


def _wrapped_words(columns: tuple[Column, ...], width: int) -> tuple[Column, ...]:
    """``columns`` with the widest of words wrapped until all fit, or none can give way any more."""
    widths = [width_of(column) for column in columns]
    while sum(widths) + _NARROW_GAP * (len(columns) - 1) > width:
        wide = [i for i, column in enumerate(columns) if column.is_word and widths[i] > _MIN_WORD_CHARS]
        if not wide:
            break
        widths[max(wide, key=widths.__getitem__)] -= 1
    return tuple(
        dataclasses.replace(column, cells=[_wrap(cell, limit) for cell in column.cells]) if column.is_word else column
        for column, limit in zip(columns, widths, strict=True)
    )


def _wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width)) if _chars(text) > width else text


def sections(heads: Sequence[Column]) -> list[tuple[int, int]]:
    """Ranges of rows that share the values of ``heads``."""
    keys = list(zip(*(head.cells for head in heads), strict=True))
    starts = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
    return list(itertools.pairwise([*starts, len(keys)]))


def _pages(layout: Layout, width: int) -> list[tuple[Column, ...]]:
    """The columns of each table that ``layout`` is divided into; none if these would be too many or too narrow."""
    words = leading_words(layout.columns)
    pages: list[tuple[Column, ...]] = []
    page = words
    for column in layout.columns[len(words) :]:
        starts_group = len(page) > len(words) and column.group != page[-1].group
        if starts_group or dataclasses.replace(layout, columns=(*page, column)).width > width:
            pages.append(page)
            page = words
        page = (*page, column)
    pages.append(page)
    fits = all(dataclasses.replace(layout, columns=page).width <= width for page in pages)
    enough = min(map(len, pages)) >= len(words) + _MIN_PAGE_NUMBERS
    return pages if fits and enough and len(pages) <= _MAX_PAGES else []


def num_rows(columns: Sequence[Column]) -> int:
    """The number of rows."""
    return len(columns[0].cells) if columns else 0
