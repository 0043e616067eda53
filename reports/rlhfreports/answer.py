"""The answer of a run in a few sentences, computed from its records.

A sentence never claims a difference of times that the interval does not carry, nor one that is smaller than the run can
tell apart (``ratios.resolvable``). Memory is counted exactly and needs no interval.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from rlhfreports.columns import CONDITIONS, HOST, axes_of, differing_words
from rlhfreports.gain import BASELINE, gain_table
from rlhfreports.ratios import Ratio, percent, resolution, resolvable
from rlhfreports.tables import GIB, outcome_word

_SIZE = ("seq_len", "prompt_len", "batch_size")


def answer(frame: pd.DataFrame) -> list[str]:
    """Up to three sentences: on memory, on time at equal memory, and on what the run can tell apart.

    Args:
        frame: the records of one run; see ``rlhfreports.columns``.
    """
    if frame.empty:
        return ["This run has no records yet."]
    is_ok = (frame["outcome"] == "ok").fillna(False)
    if not is_ok.any():
        counts = frame["outcome"].map(outcome_word).value_counts(sort=False)
        found = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        reasons = frame["error"].dropna()
        return [f"No case was measured: {found}.", *([f"The first says: {reasons.iloc[0]}"] if len(reasons) else [])]
    timed = bool(frame["total_s_per_sample"].notna().any())
    times = [_time(frame), resolution(frame)] if timed else ["No case has a time."]
    sentences = [_memory(frame, is_ok), *times]
    return [sentence for sentence in sentences if sentence]


def _memory(frame: pd.DataFrame, is_ok: pd.Series[bool]) -> str | None:
    """The method that needs least memory against the baseline, at the largest case that both were measured at."""
    frame = frame.drop(columns=[HOST, CONDITIONS], errors="ignore")  # memory hardly depends on them
    # Groups of all columns took half of the time of the answer.
    rows = frame.loc[
        is_ok & frame["total_bytes"].notna(),
        ["method", "method_title", "family", *axes_of(frame), *_SIZE, "total_bytes"],
    ]
    if rows.empty:
        return None
    for _, group in _largest_first(rows):
        least = _at(group, "total_bytes", "min")
        base = group[group["method"] == BASELINE]
        # A baseline that needs least itself is compared with the method that needs most.
        has_less = len(base) > 0 and least["method"] != BASELINE
        other = base.iloc[0] if has_less else _at(group, "total_bytes", "max")
        if least["method"] == other["method"]:
            continue
        saved = 1 - int(least["total_bytes"]) / int(other["total_bytes"])
        if saved < 0.0005:
            continue
        return (
            f"{least['method_title']} needs {percent(saved)} less memory than {other['method_title']} at the same "
            f"batch ({_gib(least, other)} against {_gib(other, least)} GiB, {_size(least, frame)})."
        )
    row = _at(rows, "total_bytes", "max")
    return f"{row['method_title']} needs {_gib(row)} GiB ({_size(row, frame)})."


def _largest_first(rows: pd.DataFrame) -> list[tuple[Any, pd.DataFrame]]:
    """The cases of one family that differ in method alone and have several methods: the longest first, then the largest
    batch, and of these the ones with the baseline."""
    groups = [
        (key, group)
        for key, group in rows.groupby(["family", *axes_of(rows), *_SIZE], sort=False, dropna=False)
        if group["method"].nunique() > 1
    ]

    def size(entry: tuple[Any, pd.DataFrame]) -> tuple[bool, int, int]:
        first = entry[1].iloc[0]
        return bool((entry[1]["method"] == BASELINE).any()), int(first["seq_len"]), int(first["batch_size"])

    return sorted(groups, key=size, reverse=True)


def _time(frame: pd.DataFrame) -> str | None:
    """The largest gain in the baseline's memory at the greatest length, if its interval and the run carry one."""
    gains = gain_table(frame).frame
    if gains.empty:
        return None
    longest = gains[gains["seq_len"] == gains["seq_len"].max()]
    base = longest["baseline_title"].iloc[0]
    where = f"at equal memory and {int(longest['seq_len'].iloc[0])} tokens"
    bound = resolvable(frame) or 0.0
    carried = longest[(longest["whole_gain_low"] > 1).fillna(False) & (longest["whole_gain"] > 1 + bound)]
    if carried.empty:
        if longest["whole_gain_low"].isna().all():
            return f"One block a case cannot tell whether another method is faster than {base} {where}."
        told = dict.fromkeys(longest["method_title"])
        who = f"Of {', '.join(told)}, no method" if _others(frame, longest, {*told, base}) else "No method"
        return f"{who} is faster than {base} {where} by more than this run can tell apart."
    best = _at(carried, "whole_gain", "max")
    gain = Ratio(*(float(best[f"whole_gain{end}"]) for end in ("", "_low", "_high")))
    words = [
        f"batch {best['batch_size']} against {best['baseline_batch_size']}",
        *differing_words(best.to_dict(), frame),
    ]
    return f"{best['method_title']} is {gain} faster than {base} {where} ({', '.join(words)})."


def _others(frame: pd.DataFrame, gains: pd.DataFrame, told: set[str]) -> set[str]:
    """The other methods of the baseline's family that were measured at the length of ``gains`` and have no gain.

    A method that does the baseline's own work has none to show.
    """
    family = frame.loc[frame["method"] == BASELINE, "family"].iloc[0]
    is_same = (frame["outcome"] == "ok") & (frame["family"] == family) & (frame["seq_len"] == gains["seq_len"].iloc[0])
    is_same &= (frame["same_work_as"] != BASELINE).fillna(True)
    return set(frame.loc[is_same.fillna(False).astype(bool), "method_title"]) - told


def _at(rows: pd.DataFrame, column: str, end: str) -> pd.Series[Any]:
    """The row with the least or the largest value of ``column``, the first of equals."""
    values = rows[column].to_numpy(dtype=float)
    row: pd.Series[Any] = rows.iloc[int(values.argmin() if end == "min" else values.argmax())]
    return row


def _gib(row: pd.Series[Any], other: pd.Series[Any] | None = None) -> str:
    """GiB with three digits, or as many more as tell them from those of ``other``."""
    sizes = [int(one["total_bytes"]) / GIB for one in (row, other) if one is not None]
    for digits in range(3, 7):
        texts = [f"{size:#.{digits}g}".rstrip(".") for size in sizes]
        if len(set(texts)) == len(texts):
            break
    return texts[0]


def _size(row: pd.Series[Any], frame: pd.DataFrame) -> str:
    words = differing_words(row.to_dict(), frame)
    return ", ".join([f"{row['seq_len']} tokens", f"batch {row['batch_size']}", *words])
