"""The largest batches that ran, beside the planned ones.

The frame has one row per kind of case: ``title`` (of the method), ``setting`` (shown where there are several),
``model``, ``seq_len``, ``planned``, ``largest_ok`` and ``smallest_failing`` (may be absent), ``num_tries``, and
``stopped_because`` (a sentence).
"""

from __future__ import annotations

import pandas as pd
from rich.table import Table

from rlhfreports.tables import text

_COLUMNS = {
    "title": "method",
    "setting": "setting",
    "model": "model",
    "seq_len": "length",
    "planned": "planned\nbatch",
    "largest_ok": "largest\nthat ran",
    "smallest_failing": "smallest\nwithout memory",
    "num_tries": "tries",
    "stopped_because": "stopped because",
}
_WORDS = ("title", "setting", "model", "stopped_because")


def max_batch_table(frame: pd.DataFrame) -> Table:
    """Returns ``frame`` as a table for the terminal."""
    table = Table(title="The largest batch", title_justify="left", box=None, header_style="bold")
    columns = {column: name for column, name in _COLUMNS.items() if column != "setting" or frame[column].nunique() > 1}
    for column, name in columns.items():
        table.add_column(name, justify="left" if column in _WORDS else "right")
    for row in frame.to_dict("records"):
        table.add_row(*(text(row[column]) for column in columns))
    return table
