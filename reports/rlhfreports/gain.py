"""The gain of a method over a baseline, divided into the gain from shared passes and from the larger batch.

At one length, with t(m, b) the seconds per sample and M(m, b) the ``total_bytes`` of method m at batch size b, for a
method m and a baseline l of one family. Only measured batch sizes count; nothing is interpolated::

    b0 = the largest batch of the baseline       M = M(l, b0)
    b1 = the largest batch with M(m, b1) <= M    (in the same memory)

    shared-pass gain   = t(l, b0) / t(m, b0)     (at the same batch)
    larger-batch gain  = t(m, b0) / t(m, b1)     (in the same memory)
    whole gain         = t(l, b0) / t(m, b1)     = shared-pass gain x larger-batch gain
    share of a part    = log(part) / log(whole)

The shares add up to 1. One is above 1 where the other part is a loss. There are none unless the whole interval of the
whole gain lies above 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from rlhfreports.columns import (
    AXES,
    CASE_AXES,
    CONDITIONS,
    HOST,
    axes_of,
    axes_that_vary,
    axis_text,
    is_measured,
    methods_in_order,
    setting_order,
    shared_axes_text,
    time_notes,
)
from rlhfreports.layouts import Column
from rlhfreports.once import once_per_frame
from rlhfreports.ratios import Ratio, blocks_of, ratio
from rlhfreports.tables import ABSENT, GIB, ReportTable, outcome_word, text
from rlhfreports.terminal import terminal

if TYPE_CHECKING:
    from rich.console import RenderableType

BASELINE = "lora"
_SIZE = ("prompt_len", "completion_len")
_NEEDED = (
    *(*_SIZE, "seq_len", "batch_size", "outcome"),
    *("total_bytes", "total_s_per_sample", "total_block_s_per_sample"),
)
_HEADINGS = (
    "baseline batch",
    "its total GiB",
    "batch in that memory",
    "shared passes",
    "larger batch",
    "together",
    "share of shared passes",
    "share of larger batch",
)
_SHORT_HEADINGS = ("batches", "shared passes", "larger batch", "together")
_UNDIVIDED = "no gain is divided"
_TRIED = ("ok", "oom", "skipped")  # outcomes that say whether a batch fits
_LEGEND = "≥: no larger batch was run: it may fit as well."
EXPLANATION = (
    "Shared passes: the baseline's time over the method's, at the baseline's batch. Larger batch: the method's time at "
    "that batch over its time at the largest measured batch in the baseline's memory. Both multiply to the whole gain; "
    "in parentheses is the 95 % interval. Shares are of the gain's logarithm, where its whole interval lies above 1."
)

_GAINS = ("shared_pass", "larger_batch", "whole")
# The columns of the CSV; it lacks the axes that the frame lacks. Gains and shares are ratios.
_COLUMNS = {
    "method": "string",
    "method_title": "string",
    "baseline": "string",
    "baseline_title": "string",
    HOST: "string",
    CONDITIONS: "string",
    **{axis: "Int64" if axis in ("lora_rank", "seed") else "string" for axis in CASE_AXES},
    **dict.fromkeys(("prompt_len", "completion_len", "seq_len"), "Int64"),
    **dict.fromkeys(("baseline_batch_size", "memory_bytes", "batch_size", "batch_total_bytes"), "Int64"),
    "tried_larger": "boolean",
    **dict.fromkeys(("baseline_s_per_sample", "same_batch_s_per_sample", "larger_batch_s_per_sample"), "Float64"),
    **{f"{gain}_gain{end}": "Float64" for gain in _GAINS for end in ("", "_low", "_high")},
    **dict.fromkeys(("shared_pass_share", "larger_batch_share"), "Float64"),
}


class GainTable(ReportTable):
    """The divided gains of a run. Its notes say which gain cannot be divided, and why.

    The columns of ``frame`` are those of ``gain.csv``: the method and its baseline, the case, b0, M, b1 and its total,
    ``tried_larger`` (a batch above b1 was run), the three times, the three gains and the two shares.
    """

    def rich(self) -> RenderableType:
        """The table for a terminal: batches as ``2 to 8``, each gain with its share."""
        columns = {name: self.cells[name].tolist() for name in self.headings[: self.num_text_columns]}
        numbers = zip(*(self.cells[heading] for heading in _HEADINGS), strict=True)
        short = [
            (f"{b0} to {b1}", _with_share(shared, shares[0]), _with_share(larger, shares[1]), whole)
            for b0, _, b1, shared, larger, whole, *shares in numbers
        ]
        columns |= {heading: [row[i] for row in short] for i, heading in enumerate(_SHORT_HEADINGS)}
        footer = [_LEGEND] if _LEGEND in self.explanation else []
        num_undivided = sum(_UNDIVIDED in note for note in self.notes)
        footer += [f"{num_undivided} that cannot be divided: gain.md says why."] if num_undivided else []
        return terminal(
            f"Gain at equal memory {self.caption}",
            [
                Column(heading=name, cells=cells, is_word=i < self.num_text_columns)
                for i, (name, cells) in enumerate(columns.items())
            ],
            footer,
        )


def has_gain(frame: pd.DataFrame, baseline: str = BASELINE) -> bool:
    """True if the baseline was measured, and a method of its family at two batch sizes of the same case."""
    return any(True for _ in _pairs(frame, baseline))


@once_per_frame
def gain_table(frame: pd.DataFrame, baseline: str = BASELINE) -> GainTable:
    """Divides the gain over ``baseline`` of every method of its family that was measured at two or more batch sizes.

    Args:
        frame: a frame of ``rlhfbench.records_frame``; see ``rlhfreports.columns``.
        baseline: the name of a method.
    """
    axes = axes_that_vary(frame)
    titles = frame.loc[frame["method"] == baseline, "method_title"]
    title = baseline if titles.empty else str(titles.iloc[0])
    lengths = frame[list(_SIZE)].drop_duplicates()
    shows_split = len(lengths) > len(set(lengths.sum(axis=1)))
    found: list[dict[str, Any]] = []
    rows: list[tuple[str, ...]] = []
    notes = time_notes(frame)
    for base, method in _pairs(frame, baseline):
        row = _divide(base, method)
        first = method.iloc[0]
        length = f"{first['prompt_len']}+{first['completion_len']}" if shows_split else f"{first['seq_len']}"
        words = [first["method_title"], *(text(first[axis]) for axis in axes), length]
        if isinstance(row, str):
            where = [first["method_title"], *(axis_text(axis, first[axis]) or f"no {axis}" for axis in axes)]
            notes.append(f"{', '.join(where)}, {length} tokens: {row}")
            continue
        shared = {name: first.get(name) for name in ("method", "method_title", *AXES, *_SIZE, "seq_len")}
        found.append({**shared, "baseline": baseline, "baseline_title": title, **row})
        rows.append((*words, *_cells(row)))
    columns: dict[str, Any] = {
        name: pd.array([row.get(name) for row in found], dtype=dtype)  # type: ignore[call-overload]
        for name, dtype in _COLUMNS.items()
        if name in frame or name not in AXES
    }
    headings = ("method", *(axis.replace("_", " ") for axis in axes), "length", *_HEADINGS)
    untried = not all(row["tried_larger"] for row in found)
    return GainTable(
        caption=" · ".join(word for word in (f"against {title}", shared_axes_text(frame)) if word),
        cells=pd.DataFrame(rows, columns=list(headings), dtype="object"),
        num_text_columns=len(headings) - len(_HEADINGS),
        explanation=f"{EXPLANATION} {_LEGEND}" if untried else EXPLANATION,
        notes=tuple(notes),
        frame=pd.DataFrame(columns),
    )


@once_per_frame
def _pairs(frame: pd.DataFrame, baseline: str) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """(rows of the baseline, rows of a method) of cases that differ in method and batch size alone, failures too."""
    places = {setting: place for place, setting in enumerate(setting_order(frame))}
    pairs = []
    # Of all columns, 1,000 cases took 3 s.
    frame = frame[["family", "method", "method_title", "method_order", *axes_of(frame), "setting_order", *_NEEDED]]
    for _, rows in frame.groupby(["family", *axes_of(frame), *_SIZE], sort=False, dropna=False):
        base = rows[rows["method"] == baseline]
        if not _usable(base).any():
            continue
        for name in methods_in_order(rows)["method"]:
            method = rows[rows["method"] == name]
            if name != baseline and method.loc[_usable(method), "batch_size"].nunique() > 1:
                pairs.append((base, method))
    # The sort is stable: other axes and methods keep their order.
    return sorted(pairs, key=lambda pair: (pair[1]["seq_len"].iloc[0], places[pair[1]["setting"].iloc[0]]))


def _usable(rows: pd.DataFrame) -> pd.Series[bool]:
    return is_measured(rows) & rows["total_bytes"].notna()


def _divide(base: pd.DataFrame, method: pd.DataFrame) -> dict[str, Any] | str:
    """The numbers of one row, or a sentence on the measurement that is missing."""
    at_b0 = base[_usable(base)].sort_values("batch_size", kind="stable").iloc[-1]
    b0, limit = int(at_b0["batch_size"]), int(at_b0["total_bytes"])
    measured = method[_usable(method)].sort_values("batch_size", kind="stable")
    same = measured[measured["batch_size"] == b0]
    if same.empty:
        outcomes = method.loc[method["batch_size"] == b0, "outcome"]
        why = "was not run" if outcomes.empty else f"ended as {outcome_word(outcomes.iloc[0])}"
        return f"{_UNDIVIDED}: the baseline's largest batch is {b0}, which {why} here."
    fitting = measured[measured["total_bytes"] <= limit]
    if fitting.empty:
        return f"{_UNDIVIDED}: no batch stays within the baseline's {limit / GIB:.3g} GiB."
    at_b1 = fitting.iloc[-1]
    b1 = int(at_b1["batch_size"])
    rows = (at_b0, same.iloc[0], at_b1)
    times = [float(row["total_s_per_sample"]) for row in rows]
    # Of the blocks that all three have: factors of other blocks do not multiply to the whole.
    blocks = [
        block for block in zip(*map(blocks_of, rows), strict=False) if all(s is not None and s > 0 for s in block)
    ]
    timed = [
        {"total_s_per_sample": s, "total_block_s_per_sample": [block[i] for block in blocks]}
        for i, s in enumerate(times)
    ]
    gains = [ratio(timed[i], timed[j]) for i, j in ((0, 1), (1, 2), (0, 2))]
    whole = gains[-1]
    shares = [math.log(gain.value) / math.log(whole.value) if whole.is_above_one else None for gain in gains[:2]]
    return {
        "baseline_batch_size": b0,
        "memory_bytes": limit,
        "batch_size": b1,
        "batch_total_bytes": int(at_b1["total_bytes"]),
        "tried_larger": bool(((method["batch_size"] > b1) & method["outcome"].isin(_TRIED)).any()),
        "baseline_s_per_sample": times[0],
        "same_batch_s_per_sample": times[1],
        "larger_batch_s_per_sample": times[2],
        **{f"{name}_gain": gain.value for name, gain in zip(_GAINS, gains, strict=True)},
        **{f"{name}_gain_low": gain.low for name, gain in zip(_GAINS, gains, strict=True)},
        **{f"{name}_gain_high": gain.high for name, gain in zip(_GAINS, gains, strict=True)},
        "shared_pass_share": shares[0],
        "larger_batch_share": shares[1],
    }


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    gains = [str(Ratio(*(row[f"{name}_gain{end}"] for end in ("", "_low", "_high")))) for name in _GAINS]
    shares = [_percent(row[name]) for name in ("shared_pass_share", "larger_batch_share")]
    size = f"{row['memory_bytes'] / GIB:.4g}"
    largest = f"{'' if row['tried_larger'] else '≥'}{row['batch_size']}"
    return (str(row["baseline_batch_size"]), size, largest, *gains, *shares)


def _with_share(gain: str, share: str) -> str:
    return gain if share == ABSENT else f"{gain}, {share}"


def _percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.0f} %"
