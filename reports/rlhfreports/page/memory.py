"""The section with the memory table."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from rlhfreports.columns import AXES
from rlhfreports.memory import NUMBERS, table
from rlhfreports.page.blocks import Block, Items, Section, table_of
from rlhfreports.page.data import Page
from rlhfreports.paper import paper_cells
from rlhfreports.tables import counted, outcome_word

_CSV_COLUMNS = (
    *("method", "family", *AXES, "prompt_len", "completion_len", "batch_size", "outcome", "error"),
    *(column for column, _, _ in NUMBERS),
    *("inference_half_width_s_per_sample", "update_half_width_s_per_sample", "total_half_width_s_per_sample"),
)
_WARNED = "A coloured number has a warning, under the pointer and in the notes."
FILTERS = ("run", "method", "family", "setting", "length", "batch")


def memory_section(page: Page) -> Section | None:
    """The memory table: a row per case, in the form of Hydra-RLHF's Table 1; ``None`` where there is no case."""
    if page.frame.empty:
        return None
    made = table(page.frame)
    rows = made.frame
    cells = made.cells.copy()
    if rows["family"].nunique() > 1:
        cells.insert(1, "family", rows["family"].fillna("").to_numpy())
    num_text_columns = made.num_text_columns + ("family" in cells)
    # Before our numbers: the last column is the one that a warning colours.
    for place, (heading, texts) in enumerate(paper_cells(rows).items(), num_text_columns):
        cells.insert(place, heading, texts)
    orders = {
        heading: [None if pd.isna(value) else float(value) for value in rows[column]]
        for column, heading, _ in NUMBERS
        if heading in made.headings
    }
    titles = [_title(row) for row in rows.to_dict("records")]
    failed = (rows["outcome"] != "ok").fillna(True)
    kinds = ["failed" if fails else "warned" if title else "" for fails, title in zip(failed, titles, strict=True)]
    # The file memory_table.csv has all columns: with them the page of 1,000 cases would grow by 2 MB.
    csv = rows[[name for name in _CSV_COLUMNS if name in rows and rows[name].notna().any()]]
    note = f"{made.explanation} {_WARNED}" if "warned" in kinds else made.explanation
    shown = dataclasses.replace(made, cells=cells, num_text_columns=num_text_columns, frame=csv, explanation=note)
    blocks: list[Block] = [
        table_of(shown, name="memory-table", orders=orders, titles=titles, kinds=kinds, filters=FILTERS),
        Items(title=counted(len(made.notes), "note"), items=made.notes),
    ]
    return Section(id="memory-table-section", title="Every case", blocks=blocks)


def _title(row: Mapping[Hashable, Any]) -> str:
    """Why a case was not measured, or the warnings that touch its numbers."""
    if row["outcome"] != "ok":
        return str(outcome_word(row["outcome"]) if pd.isna(row["error"]) else row["error"])
    found = []
    num_blocks, num_disturbed = (
        0 if pd.isna(row[f"num_{kind}_blocks"]) else row[f"num_{kind}_blocks"] for kind in ("timed", "disturbed")
    )
    if num_blocks == 1:
        found.append("One block: its times have no interval.")
    if num_disturbed:
        were = "was" if num_disturbed == 1 else "were"
        found.append(f"{num_disturbed} of {num_blocks} blocks {were} disturbed: {row['disturbed_by']}.")
    num_cut = row["num_prompts_truncated"]
    if not pd.isna(num_cut) and num_cut > 0:
        rows = "row was" if num_cut == 1 else "rows were"
        found.append(f"{num_cut} {rows} longer than the case and cut.")
    return " ".join(found)
