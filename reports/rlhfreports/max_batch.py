"""The largest batches that ran, beside those that were planned.

The table that comes in has one row a kind of case: ``title`` (the method's), ``model``, ``seq_len``, ``planned``,
``largest_ok`` and ``smallest_failing`` (numbers, or nothing), ``num_tries``, ``stopped_because`` (a sentence).
"""

from __future__ import annotations

import pandas as pd
from rich.table import Table

_COLUMNS = {
    "title": "method",
    "model": "model",
    "seq_len": "length",
    "planned": "planned\nbatch",
    "largest_ok": "largest\nthat ran",
    "smallest_failing": "smallest\nwithout memory",
    "num_tries": "tries",
    "stopped_because": "stopped because",
}
_WORDS = ("title", "model", "stopped_because")


def max_batch_table(frame: pd.DataFrame) -> Table:
    """The rows of ``frame`` for a terminal."""
    table = Table(title="The largest batch", title_justify="left", box=None, header_style="bold")
    for column, name in _COLUMNS.items():
        table.add_column(name, justify="left" if column in _WORDS else "right")
    for row in frame.to_dict("records"):
        table.add_row(*(_cell(row[column]) for column in _COLUMNS))
    return table


def _cell(value: object) -> str:
    return "–" if value is None or value is pd.NA else str(value)
