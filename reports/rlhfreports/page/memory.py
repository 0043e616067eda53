"""The section with the memory table."""

from __future__ import annotations

import dataclasses

import pandas as pd

from rlhfreports.columns import AXES
from rlhfreports.memory import NUMBERS, table
from rlhfreports.page.blocks import Block, Items, Section, Text, table_of
from rlhfreports.page.data import Page
from rlhfreports.paper import paper_cells

_CSV_COLUMNS = (
    *("method", "family", *AXES, "prompt_len", "completion_len", "batch_size", "outcome", "error"),
    *(column for column, _, _ in NUMBERS),
    *("inference_half_width_s_per_sample", "update_half_width_s_per_sample", "total_half_width_s_per_sample"),
)
FILTERS = ("run", "method", "family", "setting", "length", "batch")


def memory_section(page: Page) -> Section:
    """The memory table: a row per case, in the form of Hydra-RLHF's Table 1."""
    made = table(page.frame)
    rows = made.frame
    cells = made.cells
    if rows["family"].nunique() > 1:
        cells = cells.copy()
        cells.insert(1, "family", rows["family"].fillna("").to_numpy())
    num_text_columns = made.num_text_columns + ("family" in cells)
    cells = cells.assign(**paper_cells(rows))
    orders = {
        heading: [None if pd.isna(value) else float(value) for value in rows[column]]
        for column, heading, _ in NUMBERS
        if heading in made.headings
    }
    titles = ["" if pd.isna(error) else str(error) for error in rows["error"]]
    # The file memory_table.csv has all columns: with them the page of 1,000 cases would grow by 2 MB.
    csv = rows[[name for name in _CSV_COLUMNS if name in rows and rows[name].notna().any()]]
    shown = dataclasses.replace(made, cells=cells, num_text_columns=num_text_columns, frame=csv)
    blocks: list[Block] = [
        table_of(shown, name="memory-table", orders=orders, titles=titles, filters=FILTERS),
        Text(text=made.explanation, kind="caption"),
        Items(title=f"{len(made.notes)} notes", items=made.notes),
    ]
    return Section(id="memory-table-section", title="Memory and time of every case", blocks=blocks)
