"""The columns of the table that crosses from the harness to a report: one row per record, absent numbers are NA."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pandas as pd

ColumnType = Literal["string", "Int64", "Float64"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One documented column.

    Attributes:
        name: its name in the table, with the unit at the end where it has one.
        dtype: its nullable pandas type.
        meaning: what stands in it.
    """

    name: str
    dtype: ColumnType
    meaning: str


def _columns(dtype: ColumnType, *rows: tuple[str, str]) -> tuple[Column, ...]:
    return tuple(Column(name=name, dtype=dtype, meaning=meaning) for name, meaning in rows)


# The parts of the memory, as a record names them.
PARTS = ("base", "adapters", "heads", "gradients", "optimizer", "kv_cache", "activations", "rollout", "temporary")

# One name for each outcome that a record may have, as people read it.
OUTCOME_WORDS = {
    "ok": "ok",
    "oom": "OOM",
    "timeout": "timeout",
    "crashed": "crashed",
    "invalid": "invalid",
    "skipped": "skipped",
}

COLUMNS: tuple[Column, ...] = (
    *_columns(
        "string",
        ("case_id", "the stable id of the case"),
        ("method", "the name users give the method"),
        ("method_title", "the name reports print"),
    ),
    *_columns("Int64", ("method_order", "the method's place in the harness's table: reports sort and colour by it")),
    *_columns("string", ("model", "preset, checkpoint folder or hub id")),
    *_columns(
        "Int64",
        ("prompt_len", "tokens of a prompt"),
        ("completion_len", "tokens of a completion"),
        ("seq_len", "prompt_len + completion_len"),
        ("batch_size", "sequences per step"),
    ),
    *_columns("string", ("device", "where the step ran"), ("dtype", "the type of the weights")),
    *_columns("Int64", ("lora_rank", "rank of the adapters"), ("seed", "seed of the case")),
    *_columns(
        "string",
        ("setting", "the named setting that the options are of; custom: none"),
        ("options", "the options that are not as the setting has them, as name=value joined by commas; empty: none"),
        ("outcome", "ok, oom, timeout, crashed, invalid or skipped"),
        ("error_kind", "the kind of the error, where there is one"),
        ("error", "one sentence saying what went wrong"),
        ("error_phase", "the phase in which it went wrong, where known"),
    ),
    *_columns(
        "Int64",
        ("model_bytes", "base + adapters + heads + gradients + optimizer, at the step's highest total"),
        ("activation_bytes", "kv_cache + activations + temporary, at that moment"),
        ("rollout_bytes", "rollout, at that moment"),
        ("total_bytes", "model_bytes + activation_bytes + rollout_bytes"),
        *((f"{part}_part_bytes", f"the part {part}, at that moment") for part in PARTS),
    ),
    *_columns("Int64", ("setting_order", "the setting's place in the harness's table, 0: the default; absent: custom")),
    *_columns("string", ("peak_phase", "the phase of the step's highest total")),
    *_columns(
        "Int64",
        ("ledger_peak_bytes", "sum over live tensor storages"),
        ("allocator_peak_bytes", "CUDA allocator, peak allocated"),
        ("allocator_reserved_bytes", "CUDA allocator, peak reserved"),
        ("allocator_rest_bytes", "allocator_peak_bytes beyond ledger_peak_bytes and workspace_bytes"),
        ("workspace_bytes", "what libraries hold of the CUDA allocator's memory beside all tensors"),
        ("driver_peak_bytes", "NVML, sampled from outside the measured process"),
        ("host_peak_bytes", "resident set of the measured process"),
    ),
    *_columns(
        "Int64",
        ("predicted_model_bytes", "model_bytes as the plan has it; absent where none was asked for, or it failed"),
        ("predicted_activation_bytes", "activation_bytes as the plan has it"),
        ("predicted_rollout_bytes", "rollout_bytes as the plan has it"),
        ("predicted_total_bytes", "total_bytes as the plan has it"),
    ),
    *_columns(
        "string",
        ("predicted_peak_phase", "peak_phase as the plan has it"),
        ("plan_error", "one sentence saying why there is no plan, where one was asked for"),
    ),
    *_columns(
        "Float64",
        ("inference_s_per_sample", "seconds of the inference phases, per sequence"),
        ("update_s_per_sample", "seconds of the update phases, per sequence"),
        ("total_s_per_sample", "inference + update"),
    ),
    *_columns("Int64", ("num_timed_steps", "steps that the timing pass kept")),
    *_columns("string", ("stopped_because", "why the timing pass ended: precise, steady or budget")),
    *_columns("Float64", ("floor_fraction", "least possible time / measured time")),
    *_columns("Int64", ("num_prompts_truncated", "prompts that were cut to prompt_len")),
    *_columns("string", ("started_at", "when the case began")),
    *_columns("Float64", ("wall_s", "seconds that the whole case took")),
)

# Beside ``COLUMNS`` the table has, for every phase that some record has, the two columns below (phases are data).
PHASE_COLUMNS: tuple[Column, ...] = (
    Column(name="{phase}_phase_peak_bytes", dtype="Int64", meaning="highest total inside the phase"),
    Column(name="{phase}_phase_median_s", dtype="Float64", meaning="median seconds of the phase in one step"),
)

# What tells cases apart beside method, length and batch size. A report shows those that differ and names the rest once.
AXES: dict[str, str] = {
    "model": "{}",
    "device": "{}",
    "dtype": "{}",
    "lora_rank": "LoRA rank {}",
    "seed": "seed {}",
    "setting": "setting {}",
    "options": "{}",
}


# What a setting gives beside options. Where these change with the setting alone, they are told with its name.
_SETTING_AXES = ("dtype", "lora_rank")
# Not worth a word in a caption while it is the same everywhere.
_QUIET_AXES = ("seed",)
_MOST_CHARS = 60  # of one word of a caption: a checkpoint's path has its name at its end


def axes_that_vary(frame: pd.DataFrame) -> list[str]:
    """The names in ``AXES`` that have more than one value in ``frame`` and are not told by another of them.

    Default and custom cases alone are told apart by their options. What changes with the setting alone is told with it.
    """
    return [axis for axis in _differing(frame) if axis not in _told_elsewhere(frame)]


def _differing(frame: pd.DataFrame) -> list[str]:
    return [axis for axis in AXES if frame[axis].nunique(dropna=False) > 1]


def _told_elsewhere(frame: pd.DataFrame) -> list[str]:
    if not (frame["setting_order"] > 0).any():
        return ["setting"]
    if frame["setting"].nunique(dropna=False) == 1:
        return []
    by_setting = frame.groupby("setting", dropna=False)
    return [axis for axis in _SETTING_AXES if by_setting[axis].nunique(dropna=False).max() == 1]


def setting_order(frame: pd.DataFrame) -> list[str]:
    """The settings of ``frame`` in the harness's order, custom last."""
    settings = frame[["setting", "setting_order"]].drop_duplicates("setting")
    return settings.sort_values("setting_order", kind="stable", na_position="last")["setting"].tolist()


def axis_text(axis: str, value: object) -> str:
    """The words for one value of an axis; an empty string where there is nothing to say."""
    return "" if pd.isna(value) or value == "" else AXES[axis].format(value)  # type: ignore[call-overload]


def shared_axes_text(frame: pd.DataFrame) -> str:
    """What all rows have in common, in one line: ``tiny · cpu · float32 · LoRA rank 16``.

    What changes with the setting alone stands at the end: ``modern: float32, LoRA rank 16 · paper: bfloat16, …``.
    """
    if frame.empty:
        return ""
    differing, elsewhere = _differing(frame), _told_elsewhere(frame)
    left_out = {*differing, *_QUIET_AXES, *(["setting"] if "setting" in elsewhere else [])}
    words = [axis_text(axis, frame[axis].iloc[0]) for axis in AXES if axis not in left_out]
    with_setting = [axis for axis in _SETTING_AXES if axis in differing and axis in elsewhere]
    for setting in setting_order(frame) if with_setting else []:
        row = frame[frame["setting"] == setting].iloc[0]
        words.append(f"{setting}: {', '.join(axis_text(axis, row[axis]) for axis in with_setting)}")
    return " · ".join(word if len(word) <= _MOST_CHARS else f"…{word[-_MOST_CHARS:]}" for word in words if word)


def methods_in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """The methods of ``frame``, one row each, in the harness's order; methods that it does not list come last.

    Returns:
        A table with ``method``, ``method_title`` and ``method_order`` (NA where unlisted).
    """
    methods = frame[["method", "method_title", "method_order"]].drop_duplicates("method")
    return methods.sort_values("method_order", kind="stable", na_position="last", ignore_index=True)
