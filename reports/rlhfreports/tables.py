"""The parts that all tables share: cells as text, Markdown and CSV."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import pandas as pd

GIB = 2**30
DISTURBED = "!"  # after the seconds of a case beside which something else used the machine
ABSENT = "–"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReportTable:
    """A table, ready to be written.

    Attributes:
        caption: what all rows have in common.
        cells: the cells as printed, one column per heading.
        num_text_columns: columns of words, from the left. The others hold numbers and are aligned right.
        explanation: the paragraph below the table.
        notes: sentences below it, one per line.
        frame: the same rows at full precision.
    """

    caption: str
    cells: pd.DataFrame
    num_text_columns: int
    explanation: str
    notes: tuple[str, ...] = ()
    frame: pd.DataFrame

    @property
    def headings(self) -> tuple[str, ...]:
        """The headings of ``cells``."""
        return tuple(self.cells.columns)

    @property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The rows of ``cells``."""
        return tuple(self.cells.itertuples(index=False, name=None))

    def markdown(self) -> str:
        """The table as Markdown, with caption, explanation and notes."""
        return markdown(self.cells, self.num_text_columns, self.caption, (self.explanation,), self.notes)

    def csv(self) -> str:
        """``frame`` as CSV: integer bytes, seconds at full precision, empty cells for absent values."""
        # A carriage return in a cell has no quotes around it, and readers take it for the end of a line.
        return self.frame.to_csv(index=False, lineterminator="\n").replace("\r", " ")


def markdown(
    cells: pd.DataFrame,
    num_text_columns: int,
    caption: str = "",
    paragraphs: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> str:
    """``cells`` as a Markdown table under ``caption``, then ``paragraphs``, then ``notes`` as a list."""
    alignment = ["left"] * num_text_columns + ["right"] * (len(cells.columns) - num_text_columns)
    table = cells.map(escape).rename(columns=escape).to_markdown(index=False, disable_numparse=True, colalign=alignment)
    found = "\n".join(f"- {escape(note)}" for note in notes)
    blocks = [f"**{escape(caption)}**" if caption else "", str(table), *paragraphs, found]
    return "\n\n".join(block for block in blocks if block) + "\n"


def escape(text: str) -> str:
    """``text`` inside a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def text(value: object, absent: str = ABSENT) -> str:
    """``value`` as a cell."""
    return absent if pd.isna(value) else str(value)  # type: ignore[call-overload]


def outcome_word(outcome: object) -> str:
    """An outcome as tables and pictures write it: ``OOM``, ``TIMEOUT``, ``SKIPPED``."""
    return str(outcome).upper()


def counted(number: int, noun: str) -> str:
    """``1 case``, ``2 cases``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def decimals_for(values: Sequence[float], least: int, most: int) -> int:
    """Decimals that show three significant digits of the smallest of ``values``.

    At least ``least`` and at most ``most``; more than ``most`` where the smallest would have less than two digits.
    """
    positive = [value for value in values if value > 0]
    if not positive:
        return least
    exponent = math.floor(math.log10(min(positive)))
    return max(least, min(2 - exponent, most), 1 - exponent)


def number_text(value: float, decimals: int) -> str:
    """``value`` at ``decimals``; ``<0.001`` for a value that would round to 0."""
    smallest = 10.0**-decimals
    if 0 < value < smallest / 2:
        return f"<{smallest:.{decimals}f}"
    return f"{value:.{decimals}f}"
