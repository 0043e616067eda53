"""Tables for a terminal of any width: no cell is ever cut. ``rlhfreports.layouts`` has the forms that they take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rlhfreports.layouts import Column, Layout, fitted, leading_words, num_rows, sections, width_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table


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
        return num_rows(self.columns)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the title, the table in the form that fits, and the lines below."""
        from rich.text import Text

        if self.title:
            yield Text(self.title, style="italic", overflow="fold")
        layout, pages = fitted(self.columns, options.max_width)
        if pages:
            for i, page in enumerate(pages):
                if i:
                    yield Text()
                yield self._grid(layout, page)
        else:
            yield from self._blocks(layout)
        for line in (*self._left_out_line(layout), *self.footer):
            yield Text(line, style="dim", overflow="fold")

    def _left_out_line(self, layout: Layout) -> list[str]:
        if not layout.left_out:
            return []
        words = []
        for column in layout.left_out:
            values = list(dict.fromkeys(column.cells))
            words.append(f"{column.name} ({' or '.join(values)})" if len(values) < 3 else column.name)
        files = f" {self.files} has them." if self.files else ""
        return [f"Left out for width: {', '.join(words)}.{files}"]

    def _grid(self, layout: Layout, columns: tuple[Column, ...]) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        if not layout.heads:
            return self._table(layout, columns, range(self.num_rows), with_heading=True)
        parts: list[RenderableType] = [self._table(layout, columns, range(0), with_heading=True)]
        for start, end in sections(layout.heads):
            shown = [f"{head.name} {head.cells[start]}" for head in layout.heads if head.cells[start]]
            # The longest word is last, as a path may take lines of its own.
            parts.append(Text(", ".join(sorted(shown, key=len)), style="bold", overflow="fold"))
            parts.append(self._table(layout, columns, range(start, end), with_heading=False))
        return Group(*parts)

    def _table(self, layout: Layout, columns: tuple[Column, ...], rows: range, *, with_heading: bool) -> Table:
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
                width=width_of(column),
                vertical="bottom",
                overflow="fold",
            )
        for i in rows:
            ends = bool(self.section_ends) and self.section_ends[i] and not layout.heads
            table.add_row(*(Text(column.cells[i]) for column in columns), style=self._style(i), end_section=ends)
        return table

    def _blocks(self, layout: Layout) -> Iterator[RenderableType]:
        """One block per row: its words, then ``name: value`` for each number."""
        from rich.text import Text

        words = leading_words(layout.columns)
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
