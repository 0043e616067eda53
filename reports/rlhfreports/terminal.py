"""Tables for a terminal of any width: no cell is ever cut.

A table that is too wide gives way in this order, as far as it must:

1. headings are wrapped, then shortened, and the gap between columns is one blank
2. columns without a measured number (dashes, zeros, ``<0.001``) are left out, and named below
3. columns whose value several rows share become a line above these rows
4. words are wrapped
5. the table is divided into several, by group of columns, each with the columns that name the row, words wrapped last
6. rows become blocks of ``name: value``
"""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rlhfreports.tables import ABSENT

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

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
class _Layout:
    """Columns in pages, with a line above rows where ``heads`` changes."""

    columns: tuple[Column, ...]
    heads: tuple[Column, ...] = ()
    left_out: tuple[Column, ...] = ()
    gap: int = _NARROW_GAP

    @property
    def width(self) -> int:
        return sum(map(_width, self.columns)) + self.gap * (len(self.columns) - 1)

    @property
    def num_lines(self) -> int:
        return max((1 + cell.count("\n") for column in self.columns for cell in column.cells), default=1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TerminalTable:
    """A table that takes the form that fits the width of the terminal.

    Attributes:
        title: above the table.
        columns: those that name the row first.
        footer: lines below the table.
        styles: one per row, a rich style or ``None``.
        section_ends: one per row: leave a line blank below it.
        files: the files that have every column, named where one is left out.
    """

    title: str
    columns: tuple[Column, ...]
    footer: tuple[str, ...] = ()
    styles: tuple[str | None, ...] = ()
    section_ends: tuple[bool, ...] = ()
    files: str = ""

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self.columns[0].cells) if self.columns else 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the title, the table in the form that fits, and the lines below."""
        from rich.text import Text

        if self.title:
            yield Text(self.title, style="italic", overflow="fold")
        layout, pages = self._fit(options.max_width)
        if pages:
            for i, page in enumerate(pages):
                if i:
                    yield Text()
                yield self._grid(layout, page)
        else:
            yield from self._blocks(layout)
        for line in (*self._left_out_line(layout), *self.footer):
            yield Text(line, style="dim", overflow="fold")

    def _fit(self, width: int) -> tuple[_Layout, list[tuple[Column, ...]]]:
        """The first layout that fits ``width``, with its pages: one table, several, or none for blocks."""
        layouts = list(self._layouts(width))
        if layouts[-1].num_lines > _MAX_CELL_LINES:
            layouts.pop()
        for layout in layouts:
            if layout.width <= width:
                return layout, [layout.columns]
        for layout in layouts[-2:]:  # words as they are, then wrapped
            if pages := _pages(layout, width):
                return layout, pages
        full = tuple(column for column in self.columns if not column.is_empty)
        return _Layout(columns=full, left_out=layouts[-1].left_out), []

    def _layouts(self, width: int) -> Iterator[_Layout]:
        whole = self.columns
        yield _Layout(columns=whole, gap=_GAP)
        yield _Layout(columns=whole)
        yield _Layout(columns=tuple(map(_wrapped_heading, whole)), gap=_GAP)
        short = tuple(map(_short_heading, whole))
        yield _Layout(columns=short, gap=_GAP)
        yield _Layout(columns=short)
        empty = tuple(column for column in self.columns if column.is_empty)
        short = tuple(column for column in short if not column.is_empty)
        yield _Layout(columns=short, left_out=empty)
        heads = tuple(column for column in self.columns if column.may_head)
        if heads and len(_sections(heads)) < self.num_rows:
            short = tuple(column for column in short if not column.may_head)
            yield _Layout(columns=short, heads=heads, left_out=empty)
        else:
            heads = ()
        yield _Layout(columns=_wrapped_words(short, width), heads=heads, left_out=empty)

    def _left_out_line(self, layout: _Layout) -> list[str]:
        if not layout.left_out:
            return []
        words = []
        for column in layout.left_out:
            values = list(dict.fromkeys(column.cells))
            words.append(f"{column.name} ({' or '.join(values)})" if len(values) < 3 else column.name)
        files = f" {self.files} has them." if self.files else ""
        return [f"Left out for width: {', '.join(words)}.{files}"]

    def _grid(self, layout: _Layout, columns: tuple[Column, ...]) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        if not layout.heads:
            return self._table(layout, columns, range(self.num_rows), with_heading=True)
        parts: list[RenderableType] = [self._table(layout, columns, range(0), with_heading=True)]
        for start, end in _sections(layout.heads):
            shown = [f"{head.name} {head.cells[start]}" for head in layout.heads if head.cells[start]]
            # The longest word is last, as a path may take lines of its own.
            parts.append(Text(", ".join(sorted(shown, key=len)), style="bold", overflow="fold"))
            parts.append(self._table(layout, columns, range(start, end), with_heading=False))
        return Group(*parts)

    def _table(self, layout: _Layout, columns: tuple[Column, ...], rows: range, *, with_heading: bool) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=box.SIMPLE_HEAD if with_heading else None,
            show_header=with_heading,
            show_edge=False,
            padding=(0, layout.gap - 1 if with_heading else layout.gap, 0, 0),
            pad_edge=False,
        )
        for column in columns:
            table.add_column(
                Text(column.heading),
                justify="left" if column.is_word else "right",
                width=_width(column),
                vertical="bottom",
                overflow="fold",
            )
        for i in rows:
            ends = bool(self.section_ends) and self.section_ends[i] and not layout.heads
            table.add_row(*(Text(column.cells[i]) for column in columns), style=self._style(i), end_section=ends)
        return table

    def _blocks(self, layout: _Layout) -> Iterator[RenderableType]:
        """One block per row: its words, then ``name: value`` for each number."""
        from rich.text import Text

        words = _leading_words(layout.columns)
        numbers = layout.columns[len(words) :]
        for i in range(self.num_rows):
            first, *rest = words
            named = "".join(f", {column.name} {column.cells[i]}" for column in rest if column.cells[i])
            yield Text(first.cells[i] + named, style="bold", overflow="fold")
            for column in numbers:
                if column.cells[i]:
                    yield Text(f"  {column.name}: {column.cells[i]}", style=self._style(i) or "", overflow="fold")

    def _style(self, row: int) -> str | None:
        return self.styles[row] if self.styles else None


def terminal(
    title: str,
    columns: Iterable[Column],
    footer: Iterable[str] = (),
    *,
    styles: Sequence[str | None] = (),
    section_ends: Sequence[bool] = (),
    files: str = "",
) -> TerminalTable:
    """Returns a table for the terminal; see ``TerminalTable``."""
    return TerminalTable(
        title=title,
        columns=tuple(columns),
        footer=tuple(footer),
        styles=tuple(styles),
        section_ends=tuple(section_ends),
        files=files,
    )


def _chars(text: str) -> int:
    """The widest line of ``text`` in columns of a terminal."""
    from rich.cells import cell_len

    return max(map(cell_len, text.split("\n")))


def _width(column: Column) -> int:
    return max(map(_chars, (column.heading, *column.cells)))


def _leading_words(columns: tuple[Column, ...]) -> tuple[Column, ...]:
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
    widths = [_width(column) for column in columns]
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


def _sections(heads: Sequence[Column]) -> list[tuple[int, int]]:
    """Ranges of rows that share the values of ``heads``."""
    keys = list(zip(*(head.cells for head in heads), strict=True))
    starts = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
    return list(itertools.pairwise([*starts, len(keys)]))


def _pages(layout: _Layout, width: int) -> list[tuple[Column, ...]]:
    """The columns of each table that ``layout`` is divided into; none if these would be too many or too narrow."""
    words = _leading_words(layout.columns)
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
