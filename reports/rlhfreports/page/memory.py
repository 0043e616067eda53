"""The section with the memory table."""

from __future__ import annotations

import pandas as pd

from rlhfreports.memory import NUMBERS, table
from rlhfreports.page.blocks import Items, Section, Text, table_of
from rlhfreports.page.data import Page

FILTERS = ("run", "method", "family", "setting", "length", "batch")


def memory_section(page: Page) -> Section:
    """The memory table: a row per case, in the form of Hydra-RLHF's Table 1."""
    made = table(page.frame)
    rows = made.frame
    orders = {
        heading: [None if pd.isna(value) else float(value) for value in rows[column]]
        for column, heading, _ in NUMBERS
        if heading in made.headings
    }
    titles = ["" if pd.isna(error) else str(error) for error in rows["error"]]
    return Section(
        id="memory-table",
        title="Memory and time of every case",
        blocks=[
            table_of(made, name="memory-table", orders=orders, titles=titles, filters=FILTERS),
            Text(text=made.explanation),
            Items(title=f"{len(made.notes)} notes", items=made.notes),
        ],
    )
