"""The data frame that reports take: one row per record, nullable dtypes, NA for absent numbers.

The harness documents and makes its columns (``rlhfbench.records_frame``). Reports rely on these::

    method, method_title, method_order, family          model, device, dtype, lora_rank, seed
    same_work_as
    prompt_len, completion_len, seq_len, batch_size     setting, setting_order, options
    outcome, error, error_phase, plan_error             model_bytes, activation_bytes, rollout_bytes, total_bytes
    {part}_part_bytes, one for each part of memory      predicted_{model,activation,total}_bytes
    {inference,update,total}_s_per_sample               sequences_per_sample, num_timed_blocks
    {inference,update,total}_half_width_s_per_sample    num_{disturbed,counted}_blocks, disturbed_by
    {inference,update,total}_block_s_per_sample         allocator_rest_bytes, workspace_bytes, num_prompts_truncated
    {phase}_phase_s, {phase}_phase_block_s, one for each phase

Of these ``method``, ``method_title``, lengths, batch size and outcome are never absent.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd

_PART_END = "_part_bytes"
_PARTS_OF_RANKS = ("gathered", "buckets")

# Columns that tell cases apart beside method, length and batch size, and the words for a value of each. Frames of one
# run have no column ``run``.
RUN = "run"
# The machine that ran a case. Times of several machines are never compared within a run, so it is an axis like others.
HOST = "host"
SEGMENT = "run_segment"  # 0 for the first start of the run, n for its n-th resumption
# Optional columns, of a run that one machine measured under unlike conditions: the segment that had those of a case
# first, and how they differ from the start's, in words. Times are never compared across them either.
CONDITIONS = "conditions"
CONDITIONS_DIFFER = "conditions_differ"
START = "the start"
_ALIAS = " = "  # between names of one machine, as containers have
CASE_AXES: dict[str, str] = {
    "model": "{}",
    "device": "{}",
    "dtype": "{}",
    "lora_rank": "LoRA rank {}",
    "seed": "seed {}",
    "setting": "setting {}",
    "options": "{}",
}
AXES: dict[str, str] = {RUN: "{}", HOST: "on {}", CONDITIONS: "conditions of {}", **CASE_AXES}
IN_A_LINE = ("setting", RUN)  # axes that a line of a picture has in its name
# Axes that a setting may change. While each setting has one value, its name stands for them.
_SETTING_AXES = ("dtype", "lora_rank")
_OF_MEASURED = (HOST, CONDITIONS)  # axes on which only measured cases count
_QUIET_AXES = ("seed", *_OF_MEASURED)  # left out of captions
_MAX_WORD_CHARS = 60  # in captions; the end of a checkpoint's path is kept, as it holds the name


def axes_of(frame: pd.DataFrame) -> list[str]:
    """The axes that ``frame`` has a column for."""
    return [axis for axis in AXES if axis in frame]


def has_splits(frame: pd.DataFrame) -> bool:
    """True if a length is divided into prompt and completion in several ways."""
    splits = frame[["seq_len", "prompt_len"]].drop_duplicates()
    return splits["seq_len"].nunique() < len(splits)


def parts_of(frame: pd.DataFrame) -> list[str]:
    """The parts of memory that ``frame`` has columns for, in their order; those of ranks only where a case has some."""
    parts = [name.removesuffix(_PART_END) for name in frame.columns if name.endswith(_PART_END)]
    return [part for part in parts if part not in _PARTS_OF_RANKS or frame[f"{part}{_PART_END}"].fillna(0).any()]


def axes_that_vary(frame: pd.DataFrame) -> list[str]:
    """The axes on which cases of ``frame`` differ, without those that follow from another axis.

    Dtype and LoRA rank follow from the setting when each setting has one value. The setting follows from the options
    when it is only ever the default or custom. With several runs, every axis that has one value in each of them follows
    from the run.
    """
    return [axis for axis in _differing(frame) if axis not in _implied(frame)]


def _differing(frame: pd.DataFrame) -> list[str]:
    return [
        axis
        for axis in axes_of(frame)
        if (len(_measured(frame, axis)) if axis in _OF_MEASURED else frame[axis].nunique(dropna=False)) > 1
    ]


def _implied(frame: pd.DataFrame) -> list[str]:
    if RUN in frame and frame[RUN].nunique() > 1:
        by_run = frame.groupby(RUN)
        of_run = [axis for axis in axes_of(frame) if axis != RUN and by_run[axis].nunique(dropna=False).max() == 1]
        return list(dict.fromkeys([*of_run, *_implied(frame.drop(columns=RUN))]))
    if not (frame["setting_order"] > 0).any():
        return ["setting"]
    if frame["setting"].nunique(dropna=False) == 1:
        return []
    by_setting = frame.groupby("setting", dropna=False)
    return [axis for axis in _SETTING_AXES if by_setting[axis].nunique(dropna=False).max() == 1]


def hosts_of(frame: pd.DataFrame) -> list[str]:
    """The machines that cases of ``frame`` were measured on."""
    return _measured(frame, HOST)


def _measured(frame: pd.DataFrame, axis: str) -> list[str]:
    """The values of ``axis`` that measured cases have; none where ``frame`` lacks it."""
    if axis not in frame:
        return []
    measured = (frame["outcome"] == "ok").fillna(False).astype(bool)
    return list(frame.loc[measured, axis].dropna().unique())


def as_one_machine(frame: pd.DataFrame, hosts: Sequence[str]) -> pd.DataFrame:
    """``frame`` with every case on one machine, of which ``hosts`` are names; ``one_machine_note`` tells so."""
    return frame.assign(**{HOST: pd.array([_ALIAS.join(hosts)] * len(frame), dtype="string")})


def one_machine_note(frame: pd.DataFrame) -> str | None:
    """One sentence on hosts that stand for one machine by ``as_one_machine``, ``None`` where none do."""
    named = [host for host in hosts_of(frame) if _ALIAS in host]
    if not named:
        return None
    return f"The hosts {named[0]} count as one machine because --same-machine says so: the records cannot tell."


def hosts_note(frame: pd.DataFrame) -> str | None:
    """One sentence on the machines of cases, if several hosts are named: what of their times compares."""
    hosts = hosts_of(frame)
    if len(hosts) < 2:
        return one_machine_note(frame)
    where = f"Cases were measured on {len(hosts)} machines ({', '.join(hosts)})"
    if RUN in frame and frame[RUN].nunique() > 1:
        return f"{where}: what the times of two runs differ by may be the machines."
    return f"{where}: times are compared only between cases of one machine."


def conditions_note(frame: pd.DataFrame) -> str | None:
    """One sentence on conditions that changed as a run was resumed: what of its cases' times compares."""
    if len(_measured(frame, CONDITIONS)) < 2:
        return None
    names = [*([RUN] if RUN in frame else []), *([HOST] if len(hosts_of(frame)) > 1 else []), CONDITIONS]
    unlike = frame[frame[CONDITIONS_DIFFER].fillna("") != ""].drop_duplicates(names)
    rows = unlike.to_dict("records")
    words = "; ".join(f"{', '.join(str(row[name]) for name in names)}: {row[CONDITIONS_DIFFER]}" for row in rows)
    if RUN in frame and frame[RUN].nunique() > 1:
        return f"A run was resumed under other conditions ({words}): what the times of two runs differ by may be these."
    return (
        f"The run was resumed under other conditions ({words}): times are compared only between cases of the same "
        "conditions."
    )


def time_notes(frame: pd.DataFrame) -> list[str]:
    """Sentences on machines and conditions that differ: what of the times of ``frame`` compares."""
    return [note for note in (hosts_note(frame), conditions_note(frame)) if note is not None]


def setting_order(frame: pd.DataFrame) -> list[str]:
    """The settings of ``frame`` in the order of ``setting_order``, custom last."""
    settings = frame[["setting", "setting_order"]].drop_duplicates("setting")
    return settings.sort_values("setting_order", kind="stable", na_position="last")["setting"].tolist()


def axis_text(axis: str, value: object) -> str:
    """The words for one value of an axis, empty for an absent or empty value."""
    return "" if pd.isna(value) or value == "" else AXES[axis].format(value)  # type: ignore[call-overload]


def _options_in_common(frame: pd.DataFrame) -> list[str]:
    """The options, as ``name=value``, that every row has."""
    rows = [str(text).split(", ") for text in frame["options"].fillna("").unique()]
    return [option for option in rows[0] if option and all(option in row for row in rows)] if rows else []


def with_short_options(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` for words about its rows: without the options that all of them have, which captions name."""
    common = _options_in_common(frame) if "options" in axes_of(frame) else []
    if not common:
        return frame
    rest = [", ".join(word for word in str(text).split(", ") if word not in common) for text in frame["options"]]
    return frame.assign(options=pd.array(rest, dtype="string"))


def differing_words(row: Mapping[Hashable, Any], frame: pd.DataFrame) -> list[str]:
    """The words that tell ``row`` from other cases of ``frame``, beside method and size: one for each axis that varies.

    Args:
        row: has the axes of ``frame``.
        frame: the records.
    """
    short = dict(zip(frame["options"].fillna(""), with_short_options(frame)["options"].fillna(""), strict=True))
    values = {axis: row[axis] for axis in axes_that_vary(frame)}
    if "options" in values:
        values["options"] = short["" if pd.isna(values["options"]) else values["options"]]
    return [axis_text(axis, value) or f"no {axis}" for axis, value in values.items()]


def shared_axes_text(frame: pd.DataFrame) -> str:
    """One line with the axes that all rows share: ``tiny · cpu · float32 · LoRA rank 16``.

    Axes that follow from the setting stand at the end: ``modern: float32, LoRA rank 16 · paper: bfloat16, …``.
    """
    if frame.empty:
        return ""
    differing, implied = _differing(frame), _implied(frame)
    left_out = {*differing, *_QUIET_AXES, RUN, *(["setting"] if "setting" in implied else [])}
    words = [axis_text(axis, frame[axis].iloc[0]) for axis in axes_of(frame) if axis not in left_out]
    words += _options_in_common(frame) if "options" in differing else []
    with_setting = [axis for axis in _SETTING_AXES if axis in differing and axis in implied]
    for setting in setting_order(frame) if with_setting else []:
        row = frame[frame["setting"] == setting].iloc[0]
        words.append(f"{setting}: {', '.join(axis_text(axis, row[axis]) for axis in with_setting)}")
    return " · ".join(word if len(word) <= _MAX_WORD_CHARS else f"…{word[-_MAX_WORD_CHARS:]}" for word in words if word)


def methods_in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """The methods of ``frame``, one row each, in the order of ``method_order``; those without one come last.

    Returns:
        A frame with ``method``, ``method_title`` and ``method_order``.
    """
    methods = frame[["method", "method_title", "method_order"]].drop_duplicates("method")
    return methods.sort_values("method_order", kind="stable", na_position="last", ignore_index=True)


def is_disturbed(rows: pd.DataFrame) -> pd.Series[bool]:
    """True for rows whose seconds come from disturbed blocks too, since too few others were left."""
    among = rows["num_counted_blocks"] > rows["num_timed_blocks"] - rows["num_disturbed_blocks"]
    return among.fillna(False).astype(bool)


def is_measured(rows: pd.DataFrame) -> pd.Series[bool]:
    """True for rows that are ok and have a time that a logarithmic axis can show."""
    total = rows["total_s_per_sample"].astype("float64").fillna(math.nan)
    return (rows["outcome"] == "ok").fillna(False).astype(bool) & total.gt(0) & (total < math.inf)
