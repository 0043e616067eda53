"""The memory table, in the form of Hydra-RLHF's Table 1: what each method takes in GiB and in seconds per sample."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from rlhfreports.columns import (
    OUTCOME_WORDS,
    axes_that_vary,
    methods_in_order,
    setting_order,
    shared_axes_text,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

GIB = 2**30
ABSENT = "–"
UNIT_LINE = "GiB = 2^30 bytes at the step's highest total; s = seconds per sample."

# Headings: in files, then in a terminal, where 80 columns must do.
_MEMORY = {
    "model_bytes": ("model GiB", "model\nGiB"),
    "activation_bytes": ("activation GiB", "activ.\nGiB"),
    "rollout_bytes": ("rollout GiB", "rollout\nGiB"),
    "total_bytes": ("total GiB", "total\nGiB"),
}
_LATENCY = {
    "inference_s_per_sample": ("inference s", "infer.\ns"),
    "update_s_per_sample": ("update s", "update\ns"),
    "total_s_per_sample": ("total s/sample", "total\ns"),
}
_SHORT_HEADINGS = dict([*_MEMORY.values(), *_LATENCY.values()])
_MOST_NOTES_IN_TERMINAL = 8
_AXIS_HEADINGS = {"lora_rank": "LoRA rank"}
# Where a row that was not measured says so.
_OUTCOME_CELL = "total_bytes"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryTable:
    """The memory table, ready to be written.

    Attributes:
        caption: what all rows have in common.
        headings: one a column.
        rows: the cells as printed, one tuple a record.
        num_text_columns: how many columns from the left hold words; the rest hold numbers.
        unmeasured: for each row, whether its case gave no measurement.
        notes: on prompts that were cut, then one for each record that is not ok, the skipped ones last.
        frame: the same rows in the same order, with every column at full precision.
    """

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_text_columns: int
    unmeasured: tuple[bool, ...]
    notes: tuple[str, ...]
    frame: pd.DataFrame

    def markdown(self) -> str:
        """The table as GitHub's Markdown, columns padded so that the source reads well too."""
        head = [escape(heading) for heading in self.headings]
        body = [[escape(cell) for cell in row] for row in self.rows]
        widths = [max(3, *(len(row[i]) for row in [head, *body])) for i in range(len(head))]
        is_text = [i < self.num_text_columns for i in range(len(head))]
        rule = [
            ("-" * width) if text else ("-" * (width - 1) + ":") for width, text in zip(widths, is_text, strict=True)
        ]
        lines = [f"**{escape(self.caption)}**", ""] if self.caption else []
        for row in (head, rule, *body):
            cells = [
                cell.ljust(width) if text else cell.rjust(width)
                for cell, width, text in zip(row, widths, is_text, strict=True)
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", UNIT_LINE]
        lines += ["", *(f"- {escape(note)}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Every column of every row: integer bytes, seconds at full precision, empty where absent."""
        return self.frame.to_csv(index=False, lineterminator="\n")

    def rich(self) -> RenderableType:
        """The table for a terminal."""
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.caption), box=box.SIMPLE_HEAD, title_justify="left", padding=0)
        for i, heading in enumerate(self.headings):
            table.add_column(
                Text(_SHORT_HEADINGS.get(heading, heading)),
                justify="left" if i < self.num_text_columns else "right",
                overflow="fold",
                no_wrap=i == 0,
            )
        for row, unmeasured, section in zip(self.rows, self.unmeasured, self._section_ends(), strict=True):
            table.add_row(*(Text(cell) for cell in row), style="yellow" if unmeasured else None, end_section=section)
        shown = self.notes[:_MOST_NOTES_IN_TERMINAL]
        footer = [UNIT_LINE, *(f"• {note}" for note in shown)]
        if len(self.notes) > len(shown):
            footer.append(f"• {len(self.notes) - len(shown)} more notes stand in the Markdown table.")
        return Group(table, *(Text(line, style="dim") for line in footer))

    def _section_ends(self) -> list[bool]:
        """Whether a row is the last of its block: of one length, batch size and whatever else varies.

        Methods and settings aside.
        """
        places = [i for i in range(1, self.num_text_columns) if self.headings[i] != "setting"]
        keys = [[row[i] for i in places] for row in self.rows]
        return [i + 1 < len(keys) and keys[i + 1] != key for i, key in enumerate(keys)]


def memory_table(frame: pd.DataFrame) -> MemoryTable:
    """The memory table of ``frame``, one row per record.

    Rows are ordered by what varies (model, device, ...), length, batch size, method and then setting, so that methods
    and settings stand under each other at equal size. The length is a column where the run has several, and so is
    everything else that tells its cases apart; what they have in common is the caption.

    Args:
        frame: a table with the columns of ``rlhfreports.columns``.
    """
    ordered = _ordered(frame)
    axes = sorted(axes_that_vary(ordered), key=lambda axis: axis != "setting")  # beside the method that it runs
    texts = {"method": ordered["method_title"].fillna(ordered["method"]).tolist()}
    texts |= {_AXIS_HEADINGS.get(axis, axis): [_cell(value) for value in ordered[axis]] for axis in axes}
    caption = [shared_axes_text(ordered)]
    lengths = _lengths(ordered)
    if len(set(lengths)) > 1:
        texts["length"] = lengths
    elif lengths:
        caption.append(f"{lengths[0]} tokens")
    texts["batch"] = [_cell(value) for value in ordered["batch_size"]]
    measured = (ordered["outcome"] == "ok").fillna(False).tolist()
    numbers = _numbers(ordered, measured)
    columns = {**texts, **numbers}
    return MemoryTable(
        caption=" · ".join(word for word in caption if word),
        headings=tuple(columns),
        rows=tuple(zip(*columns.values(), strict=True)),
        num_text_columns=len(texts),
        unmeasured=tuple(not ok for ok in measured),
        notes=_notes(ordered, texts),
        frame=ordered,
    )


def outcome_word(outcome: object) -> str:
    """The word for an outcome, as people read it: ``oom`` is ``OOM``."""
    return OUTCOME_WORDS.get(str(outcome), str(outcome))


def decimals_for(values: Sequence[float], least: int, most: int) -> int:
    """Decimals that give the smallest of ``values`` three significant digits, or two where that takes over ``most``.

    Never fewer than ``least``; more than ``most`` only where the smallest value has fewer than two digits otherwise.
    """
    positive = [value for value in values if value > 0]
    if not positive:
        return least
    exponent = math.floor(math.log10(min(positive)))
    return max(least, min(2 - exponent, most), 1 - exponent)


def number_text(value: float, decimals: int) -> str:
    """``value`` at ``decimals``; what would round to 0 without being 0 is written as ``<0.001``."""
    smallest = 10.0**-decimals
    if 0 < value < smallest / 2:
        return f"<{smallest:.{decimals}f}"
    return f"{value:.{decimals}f}"


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    places = {method: place for place, method in enumerate(methods_in_order(frame)["method"])}
    settings = {setting: place for place, setting in enumerate(setting_order(frame))}
    axes = [axis for axis in axes_that_vary(frame) if axis != "setting"]
    keys = [*axes, "seq_len", "prompt_len", "batch_size", "_place", "_setting"]
    placed = frame.assign(
        _place=frame["method"].map(places).astype("Int64"), _setting=frame["setting"].map(settings).astype("Int64")
    )
    # Axes keep the order in which the sweep named them; only numbers are sorted by size.
    for axis in axes:
        if frame[axis].dtype == "string":
            first_seen = {value: place for place, value in enumerate(frame[axis].drop_duplicates())}
            placed[axis] = frame[axis].map(first_seen)
    order = placed.sort_values(keys, kind="stable").index
    return frame.loc[order].reset_index(drop=True)


def _lengths(frame: pd.DataFrame) -> list[str]:
    """Lengths as ``800``, or as ``400+400`` where one total is split in several ways."""
    splits = frame[["seq_len", "prompt_len"]].drop_duplicates()
    if splits["seq_len"].nunique() == len(splits):
        return [_cell(value) for value in frame["seq_len"]]
    return [f"{_cell(p)}+{_cell(c)}" for p, c in zip(frame["prompt_len"], frame["completion_len"], strict=True)]


def _numbers(frame: pd.DataFrame, measured: list[bool]) -> dict[str, list[str]]:
    """The number columns as printed. An unmeasured row has its outcome's word in the total and dashes elsewhere."""
    cells: dict[str, list[str]] = {}
    for columns, scale, least, most in ((_MEMORY, GIB, 1, 3), (_LATENCY, 1, 2, 4)):
        scaled = {name: [math.nan if pd.isna(x) else float(x) / scale for x in frame[name]] for name in columns}
        total = list(scaled.values())[-1]
        decimals = decimals_for([x for x, ok in zip(total, measured, strict=True) if ok], least, most)
        for name, (heading, _) in columns.items():
            cells[heading] = [
                number_text(value, decimals) if ok and not math.isnan(value) else ABSENT
                for value, ok in zip(scaled[name], measured, strict=True)
            ]
    words = [outcome_word(outcome) for outcome in frame["outcome"]]
    heading, _ = _MEMORY[_OUTCOME_CELL]
    cells[heading] = [cell if ok else word for cell, ok, word in zip(cells[heading], measured, words, strict=True)]
    return cells


def _notes(frame: pd.DataFrame, texts: dict[str, list[str]]) -> tuple[str, ...]:
    notes: list[str] = []
    num_cut = frame["num_prompts_truncated"].max()
    if not pd.isna(num_cut) and num_cut > 0:
        notes.append(f"Prompts longer than the prompt length were cut from the left: up to {num_cut} in one case.")
    rest = frame["allocator_rest_bytes"].dropna()
    if len(rest):
        low, high = (number_text(float(value) / GIB, 3) for value in (rest.min(), rest.max()))
        most = number_text(float(frame["workspace_bytes"].max()) / GIB, 3)
        span = low if low == high else f"{low} to {high}"
        notes.append(
            f"At its own peak CUDA's allocator had handed out {span} GiB beyond these totals and up to {most} GiB of "
            "libraries' workspaces."
        )
    skipped: list[str] = []
    for i, row in enumerate(frame[["outcome", "error_phase", "error"]].to_dict("records")):
        if row["outcome"] == "ok":
            continue
        where = [cells[i] if heading == "method" else f"{heading} {cells[i]}" for heading, cells in texts.items()]
        phase = "" if pd.isna(row["error_phase"]) else f" in {row['error_phase']}"
        error = "" if pd.isna(row["error"]) else f": {row['error']}"
        note = f"{', '.join(where)}: {outcome_word(row['outcome'])}{phase}{error}"
        (skipped if row["outcome"] == "skipped" else notes).append(note)
    return (*notes, *skipped)


def _cell(value: object) -> str:
    return "" if pd.isna(value) else str(value)  # type: ignore[call-overload]


def escape(text: str) -> str:
    """``text`` inside one cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
