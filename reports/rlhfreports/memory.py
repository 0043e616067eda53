"""The memory table, in the form of Table 1 of Hydra-RLHF: GiB and seconds per sample of each method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from rlhfreports.columns import (
    axes_that_vary,
    is_disturbed,
    methods_in_order,
    setting_order,
    shared_axes_text,
    time_notes,
    with_short_options,
)
from rlhfreports.layouts import Column
from rlhfreports.ratios import interval_decimals, resolution
from rlhfreports.tables import (
    ABSENT,
    DISTURBED,
    GIB,
    ReportTable,
    counted,
    decimals_for,
    number_text,
    outcome_word,
    text,
)
from rlhfreports.terminal import terminal

if TYPE_CHECKING:
    from rich.console import RenderableType

UNIT_LINE = (
    "GiB = 2^30 bytes at the step's highest total; process: the largest that the whole process took; s = seconds per "
    "sample."
)
INTERVAL_LINE = "±: half of the 95 % interval of the total, from blocks."
_TOTAL_HEADING, _INTERVAL_HEADING = "total s/sample", "± s"
# Columns of numbers, bytes first: in the frame; heading in files; heading in a terminal of 80 columns.
NUMBERS = (
    ("model_bytes", "model GiB", "model\nGiB"),
    ("activation_bytes", "activation GiB", "act.\nGiB"),
    ("rollout_bytes", "rollout GiB", "roll.\nGiB"),
    ("total_bytes", "total GiB", "total\nGiB"),
    ("process_peak_bytes", "process GiB", "proc\nGiB"),
    ("prepare_s_per_sample", "prepare s", "prep.\ns"),
    ("inference_s_per_sample", "inference s", "infer.\ns"),
    ("update_s_per_sample", "update s", "update\ns"),
    ("total_s_per_sample", _TOTAL_HEADING, "total\ns"),
)
_HALF_WIDTH = "total_half_width_s_per_sample"
_OUTCOME_COLUMN = "total_bytes"  # has the outcome in place of a number where nothing was measured
_OPTIONAL = ("prepare_s_per_sample",)  # columns that a table has only where a row has a number in them
_SHORT_HEADINGS = {
    "length": "len.",
    **{heading: short for _, heading, short in NUMBERS},
    _INTERVAL_HEADING: "±\ns",
}
_AXIS_HEADINGS = {"lora_rank": "LoRA rank"}
_MAX_TERMINAL_NOTES = 8
_MAX_DECIMALS = 5


class MemoryTable(ReportTable):
    """The memory table. Its notes tell of cut prompts, then of every case that is not ok, skipped ones last."""

    @property
    def unmeasured(self) -> tuple[bool, ...]:
        """For each row, whether its case has no measurement."""
        return tuple(~_is_ok(self.frame))

    def rich(self) -> RenderableType:
        """The table for a terminal, without the note on what the run can tell apart: it is printed beside the table."""
        said = resolution(self.frame)
        notes = [note for note in self.notes if note != said]
        hidden = len(notes) - _MAX_TERMINAL_NOTES
        footer = [self.explanation, *(f"• {note}" for note in notes[:_MAX_TERMINAL_NOTES])]
        footer += [f"• {counted(hidden, 'more note')} in the Markdown table."] if hidden > 0 else []
        return terminal(
            self.caption,
            [self._column(i, name) for i, name in enumerate(self.headings)],
            footer,
            styles=["yellow" if unmeasured else None for unmeasured in self.unmeasured],
            section_ends=self._section_ends(),
            files="memory_table.md",
        )

    def _column(self, place: int, heading: str) -> Column:
        is_word = place < self.num_text_columns
        return Column(
            heading=heading,
            cells=self.cells[heading].tolist(),
            short=_SHORT_HEADINGS.get(heading, ""),
            is_word=is_word,
            may_head=is_word and heading not in ("method", "setting"),
            group=0 if heading.endswith("GiB") else 1,
        )

    def _section_ends(self) -> list[bool]:
        """For each row, whether the next one differs in more than method and setting."""
        names = [name for name in self.headings[1 : self.num_text_columns] if name != "setting"]
        keys = self.cells[names].agg(tuple, axis=1).tolist() if len(self.cells) else []
        return [i + 1 < len(keys) and keys[i + 1] != key for i, key in enumerate(keys)]


def table(frame: pd.DataFrame) -> MemoryTable:
    """Returns the memory table of ``frame``, one row per record.

    Rows are sorted by the axes that vary (model, device, …), length, batch size, method and setting. Every axis that
    varies is a column, and so is the length; what all rows share is the caption. Numbers that a method does not have,
    such as the update of a method that trains nothing, are dashes.

    Args:
        frame: a frame of ``rlhfbench.records_frame``; see ``rlhfreports.columns``.
    """
    ordered = _ordered(frame)
    axes = sorted(axes_that_vary(ordered), key=lambda axis: axis != "setting")  # the setting beside its method
    short, words = with_short_options(ordered), {"method": ordered["method_title"].tolist()}
    words |= {_AXIS_HEADINGS.get(axis, axis): [text(value, "") for value in short[axis]] for axis in axes}
    caption = [shared_axes_text(ordered)]
    lengths = _lengths(ordered)
    if len(set(lengths)) > 1:
        words["length"] = lengths
    elif lengths:
        caption.append(f"{lengths[0]} tokens")
    words["batch"] = [text(value, "") for value in ordered["batch_size"]]
    numbers = _numbers(ordered)
    has_intervals = bool(ordered[_HALF_WIDTH].notna().any())
    if has_intervals:
        numbers[_INTERVAL_HEADING] = interval_texts(
            ordered[_HALF_WIDTH], ordered["total_s_per_sample"], ordered[_HALF_WIDTH]
        )
    marked = _INTERVAL_HEADING if has_intervals else _TOTAL_HEADING
    numbers[marked] = [
        cell + DISTURBED if disturbed else cell
        for cell, disturbed in zip(numbers[marked], is_disturbed(ordered), strict=True)
    ]
    return MemoryTable(
        caption=" · ".join(word for word in caption if word),
        cells=pd.DataFrame({**words, **numbers}, dtype="object"),
        num_text_columns=len(words),
        explanation=f"{UNIT_LINE} {INTERVAL_LINE}" if has_intervals else UNIT_LINE,
        notes=_notes(ordered, words),
        frame=ordered,
    )


def _is_ok(frame: pd.DataFrame) -> pd.Series[bool]:
    return (frame["outcome"] == "ok").fillna(False).astype(bool)


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    axes = [axis for axis in axes_that_vary(frame) if axis != "setting"]
    # Words keep the order in which the sweep named them; only numbers are sorted by size.
    orders = {axis: frame[axis].drop_duplicates().tolist() for axis in axes if frame[axis].dtype == "string"}
    orders |= {"method": methods_in_order(frame)["method"].tolist(), "setting": setting_order(frame)}
    placed = frame.assign(
        **{name: frame[name].map(orders[name].index, na_action="ignore").astype("Int64") for name in orders}
    )
    keys = [*axes, "seq_len", "prompt_len", "batch_size", "method", "setting"]
    return frame.loc[placed.sort_values(keys, kind="stable").index].reset_index(drop=True)


def _lengths(frame: pd.DataFrame) -> list[str]:
    """Lengths as ``800``, or as ``400+400`` where one total is split in several ways."""
    splits = frame[["seq_len", "prompt_len"]].drop_duplicates()
    if splits["seq_len"].nunique() == len(splits):
        return [text(value, "") for value in frame["seq_len"]]
    return [f"{text(p, '')}+{text(c, '')}" for p, c in zip(frame["prompt_len"], frame["completion_len"], strict=True)]


def _numbers(frame: pd.DataFrame) -> dict[str, list[str]]:
    """The columns of numbers. An unmeasured row has its outcome as its total and dashes elsewhere."""
    measured = _is_ok(frame)
    decimals = {
        name: decimals_for((frame.loc[measured, name].dropna() / scale).tolist(), least, most)
        for name, scale, least, most in (
            ("total_bytes", GIB, 1, 3),
            ("process_peak_bytes", GIB, 1, 2),
            ("total_s_per_sample", 1, 2, 4),
        )
    }
    cells = {}
    for name, heading, _ in NUMBERS:
        if name in _OPTIONAL and frame[name].isna().all():
            continue
        scale, ruler = (GIB, "total_bytes") if name.endswith("_bytes") else (1, "total_s_per_sample")
        rounded = [decimals.get(name, decimals[ruler])] * len(frame)
        if scale == 1 and name not in _OPTIONAL:
            half_width = name.replace("_s_", "_half_width_s_", 1)
            rounded = [
                decimals[ruler] if pd.isna(width) else _decimals(value, width)
                for value, width in zip(frame[name], frame[half_width], strict=True)
            ]
        absent = [outcome_word(outcome) if name == _OUTCOME_COLUMN else ABSENT for outcome in frame["outcome"]]
        cells[heading] = [
            (ABSENT if pd.isna(value) else number_text(float(value) / scale, places)) if ok else word
            for value, ok, word, places in zip(frame[name], measured, absent, rounded, strict=True)
        ]
    return cells


def interval_texts(values: pd.Series[Any], seconds: pd.Series[Any], half_widths: pd.Series[Any]) -> list[str]:
    """``values`` with as many decimals as the interval of ``seconds`` carries.

    Without an interval three, and more where these would leave less than two digits of the seconds.
    """
    return [_interval_text(*row) for row in zip(values, seconds, half_widths, strict=True)]


def _interval_text(value: Any, second: Any, half_width: Any) -> str:
    if pd.isna(value):
        return ABSENT
    decimals = decimals_for([float(second)], 3, 3) if pd.isna(half_width) else _decimals(second, half_width)
    return number_text(float(value), decimals)


def _decimals(value: float, half_width: float) -> int:
    return min(interval_decimals(float(value), float(half_width)), _MAX_DECIMALS)


def _disturbances(frame: pd.DataFrame) -> list[str]:
    """One sentence on disturbed blocks that were set aside, and one on cases that had too few others."""
    num_disturbed, shown = frame["num_disturbed_blocks"].fillna(0), is_disturbed(frame)
    if not num_disturbed.any():
        return []
    found = []
    if (num_disturbed > 0)[~shown].any():
        num = int(num_disturbed[~shown].sum())
        worst = _most_disturbed_by(frame[~shown])
        found.append(f"{num} disturbed {'block does' if num == 1 else 'blocks do'} not count: {worst}.")
    if shown.any():
        worst = _most_disturbed_by(frame[shown])
        found.append(
            f"{DISTURBED}: {shown.sum()} of {len(frame)} cases {'is' if shown.sum() == 1 else 'are'} shown with "
            f"disturbed blocks, as too few others are left: {worst}."
        )
    return found


def _most_disturbed_by(frame: pd.DataFrame) -> str:
    """The disturbance of the case with the most disturbed blocks."""
    place = int(frame["num_disturbed_blocks"].fillna(0).to_numpy().argmax())
    return str(frame["disturbed_by"].iloc[place])


def _notes(frame: pd.DataFrame, words: dict[str, list[str]]) -> tuple[str, ...]:
    notes: list[str] = [] if frame["num_timed_blocks"].isna().all() else [resolution(frame)]
    notes += [*time_notes(frame), *_disturbances(frame)]
    # A side of a comparison may have more than its run asked for.
    lost = int((frame["num_blocks"] - frame["num_timed_blocks"])[_is_ok(frame)].clip(lower=0).sum())
    if lost:
        notes.append(
            "A block is missing: it failed, or the run was ended before it."
            if lost == 1
            else f"{lost} blocks are missing: they failed, or the run was ended before them."
        )
    num_blocks = frame.loc[_is_ok(frame), "num_timed_blocks"].dropna()
    num_single = int((num_blocks == 1).sum())
    if 0 < num_single < int((num_blocks > 0).sum()):
        notes.append(f"{counted(num_single, 'case')} timed in one block: no interval.")
    num_cut = frame["num_prompts_truncated"].max()
    if not pd.isna(num_cut) and num_cut > 0:
        notes.append(
            f"Rows longer than their case were cut, prompts on the left, completions on the right: up to {num_cut}."
        )
    rest = frame["allocator_rest_bytes"].dropna()
    if len(rest):
        low, high = (number_text(float(value) / GIB, 3) for value in (rest.min(), rest.max()))
        most = number_text(float(frame["workspace_bytes"].fillna(0).max()) / GIB, 3)
        span = low if low == high else f"{low} to {high}"
        notes.append(
            f"At its own peak CUDA's allocator had handed out {span} GiB beyond these totals and up to {most} GiB of "
            "libraries' workspaces."
        )
    skipped: list[str] = []
    for i, row in enumerate(frame[["outcome", "error_phase", "error"]].to_dict("records")):
        if row["outcome"] == "ok":
            continue
        where = [cells[i] if heading == "method" else f"{heading} {cells[i]}" for heading, cells in words.items()]
        phase = "" if pd.isna(row["error_phase"]) else f" in {row['error_phase']}"
        error = "" if pd.isna(row["error"]) else f": {row['error']}"
        note = f"{', '.join(where)}: {outcome_word(row['outcome'])}{phase}{error}"
        (skipped if row["outcome"] == "skipped" else notes).append(note)
    return (*notes, *skipped)
