"""How a method's gain over a baseline divides: what comes from shared passes, what from the larger batch.

At one length, with t(m, b) the seconds per sample and M(m, b) the ``total_bytes`` of method m at batch size b, for a
method m against a baseline l, where only batch sizes that were measured count and nothing is interpolated::

    b0 = the baseline's largest batch            M = M(l, b0)
    b1 = the largest batch with M(m, b1) <= M    (what m makes of the same memory)

    shared-pass gain   = t(l, b0) / t(m, b0)     (the same batch: what the method itself saves)
    larger-batch gain  = t(m, b0) / t(m, b1)     (the same memory: what the batch that it makes room for saves)
    whole gain         = t(l, b0) / t(m, b1)     = shared-pass gain x larger-batch gain
    share of a part    = log(part) / log(whole)

The two shares add up to 1. One is above 1 where the other part is a loss. There are none where the whole is no gain.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from rlhfreports.columns import AXES, axes_that_vary, axis_text, methods_in_order, setting_order, shared_axes_text
from rlhfreports.panels import is_measured
from rlhfreports.table import ABSENT, GIB, escape, outcome_word

if TYPE_CHECKING:
    from rich.console import RenderableType

BASELINE = "lora"
_SIZE = ("prompt_len", "completion_len")
_GROUP = (*AXES, *_SIZE)
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
_UNTRIED = "≥:"
EXPLANATION = (
    "Shared passes: the baseline's time over the method's, at the baseline's batch. Larger batch: the method's time at "
    "that batch over its time at the largest measured batch in the baseline's memory. Both multiply to the whole gain; "
    "shares are of its logarithm."
)

# The columns of the CSV. ``num_…`` and sizes are whole numbers; gains and shares have no unit.
_COLUMNS = {
    "method": "string",
    "method_title": "string",
    "baseline": "string",
    "baseline_title": "string",
    **{axis: "Int64" if axis in ("lora_rank", "seed") else "string" for axis in AXES},
    **dict.fromkeys(("prompt_len", "completion_len", "seq_len"), "Int64"),
    **dict.fromkeys(("baseline_batch_size", "memory_bytes", "batch_size", "batch_total_bytes"), "Int64"),
    "tried_larger": "boolean",
    **dict.fromkeys(("baseline_s_per_sample", "same_batch_s_per_sample", "larger_batch_s_per_sample"), "Float64"),
    **dict.fromkeys(("shared_pass_gain", "larger_batch_gain", "whole_gain"), "Float64"),
    **dict.fromkeys(("shared_pass_share", "larger_batch_share"), "Float64"),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GainTable:
    """The divided gains of a run.

    Attributes:
        caption: what all rows have in common.
        headings: one a column.
        rows: the cells as printed.
        notes: for each gain that cannot be divided, why.
        frame: the same rows at full precision, with the columns of ``gain.csv``: the method and its baseline, what the
            case is, b0, M, b1 and its total, whether a batch above b1 was run at all, the three times, the three gains
            and the two shares of the module's text.
    """

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    frame: pd.DataFrame

    def markdown(self) -> str:
        """The table as GitHub's Markdown, what its columns mean, and the notes."""
        lines = [f"**{escape(self.caption)}**", "", f"| {' | '.join(map(escape, self.headings))} |"]
        num_words = len(self.headings) - len(_HEADINGS)
        lines.append(f"|{' --- |' * num_words}{' ---: |' * len(_HEADINGS)}")
        lines += [f"| {' | '.join(map(escape, row))} |" for row in self.rows]
        lines += ["", EXPLANATION, *([self.legend] if self.legend else [])]
        lines += ["", *(f"- {escape(note)}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Every column at full precision, empty where absent."""
        return self.frame.to_csv(index=False, lineterminator="\n")

    def rich(self) -> RenderableType:
        """The table for a terminal: batches as ``2 to 8``, each gain with its share."""
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=Text(f"Gain at equal memory {self.caption}"), box=box.SIMPLE_HEAD, title_justify="left", padding=0
        )
        num_words = len(self.headings) - len(_HEADINGS)
        for i, heading in enumerate((*self.headings[:num_words], *_SHORT_HEADINGS)):
            table.add_column(heading, justify="left" if i < num_words else "right", no_wrap=i == 0)
        for row in self.rows:
            words, (b0, _, b1, shared, larger, whole, *shares) = row[:num_words], row[num_words:]
            gains = [
                f"{gain}{'' if share == ABSENT else f', {share}'}"
                for gain, share in ((shared, shares[0]), (larger, shares[1]))
            ]
            table.add_row(*words, f"{b0} to {b1}", *gains, whole)
        footer = [self.legend] if self.legend else []
        if self.notes:
            footer.append(f"{len(self.notes)} that cannot be divided: gain.md says why.")
        return Group(table, *(Text(line, style="dim") for line in footer))

    @property
    def legend(self) -> str:
        """What the sign before a batch size means; empty where none has it."""
        return "" if self.frame["tried_larger"].all() else f"{_UNTRIED} no larger batch was run: it may fit as well."


def has_gain(frame: pd.DataFrame, baseline: str = BASELINE) -> bool:
    """Whether somewhere the baseline is measured at one batch size and another method at two."""
    return any(True for _ in _pairs(frame, baseline))


def gain_table(frame: pd.DataFrame, baseline: str = BASELINE) -> GainTable:
    """Divides the gain over ``baseline`` of every method that was measured at two or more batch sizes.

    Args:
        frame: a table with the columns of ``rlhfreports.columns``.
        baseline: a method's name.
    """
    axes = axes_that_vary(frame)
    titles = frame.loc[frame["method"] == baseline, "method_title"]
    title = baseline if titles.empty or pd.isna(titles.iloc[0]) else str(titles.iloc[0])
    lengths = frame[list(_SIZE)].drop_duplicates()
    shows_split = len(lengths) > len(set(lengths.sum(axis=1)))
    found: list[dict[str, Any]] = []
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    for base, method in _pairs(frame, baseline):
        row = _divide(base, method)
        first = method.iloc[0]
        length = f"{first['prompt_len']}+{first['completion_len']}" if shows_split else f"{first['seq_len']}"
        words = [_title(first), *("–" if pd.isna(first[axis]) else str(first[axis]) for axis in axes), length]
        if isinstance(row, str):
            where = [_title(first), *(axis_text(axis, first[axis]) or f"no {axis}" for axis in axes)]
            notes.append(f"{', '.join(where)}, {length} tokens: {row}")
            continue
        shared = {name: first[name] for name in ("method", "method_title", *AXES, *_SIZE, "seq_len")}
        found.append({**shared, "baseline": baseline, "baseline_title": title, **row})
        rows.append((*words, *_cells(row)))
    return GainTable(
        caption=" · ".join(word for word in (f"against {title}", shared_axes_text(frame)) if word),
        headings=("method", *(axis.replace("_", " ") for axis in axes), "length", *_HEADINGS),
        rows=tuple(rows),
        notes=tuple(notes),
        frame=pd.DataFrame(
            {name: pd.array([row.get(name) for row in found], dtype=dtype) for name, dtype in _COLUMNS.items()}  # type: ignore[call-overload]
        ),
    )


def _pairs(frame: pd.DataFrame, baseline: str) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """(rows of the baseline, rows of a method) at one length of otherwise equal cases, failures among them."""
    places = {setting: place for place, setting in enumerate(setting_order(frame))}
    pairs = []
    for _, rows in frame.groupby(list(_GROUP), sort=False, dropna=False):
        base = rows[rows["method"] == baseline]
        if not _usable(base).any():
            continue
        for name in methods_in_order(rows)["method"]:
            method = rows[rows["method"] == name]
            if name != baseline and method.loc[_usable(method), "batch_size"].nunique() > 1:
                pairs.append((base, method))
    # By length, then setting; what else varies keeps its order, and so do the methods.
    return sorted(pairs, key=lambda pair: (pair[1]["seq_len"].iloc[0], places[pair[1]["setting"].iloc[0]]))


def _usable(rows: pd.DataFrame) -> pd.Series[bool]:
    return is_measured(rows) & rows["total_bytes"].notna()


def _divide(base: pd.DataFrame, method: pd.DataFrame) -> dict[str, Any] | str:
    """The numbers of one row, or a sentence on which of them was not measured."""
    at_b0 = base[_usable(base)].sort_values("batch_size", kind="stable").iloc[-1]
    b0, limit = int(at_b0["batch_size"]), int(at_b0["total_bytes"])
    measured = method[_usable(method)].sort_values("batch_size", kind="stable")
    same = measured[measured["batch_size"] == b0]
    if same.empty:
        outcomes = method.loc[method["batch_size"] == b0, "outcome"]
        why = "was not run" if outcomes.empty else f"ended as {outcome_word(outcomes.iloc[0])}"
        return f"no gain is divided: the baseline's largest batch is {b0}, which {why} here."
    fitting = measured[measured["total_bytes"] <= limit]
    if fitting.empty:
        return f"no gain is divided: no batch stays within the baseline's {limit / GIB:.3g} GiB."
    at_b1 = fitting.iloc[-1]
    b1 = int(at_b1["batch_size"])
    times = [float(row["total_s_per_sample"]) for row in (at_b0, same.iloc[0], at_b1)]
    shared, larger, whole = times[0] / times[1], times[1] / times[2], times[0] / times[2]
    share = math.log(shared) / math.log(whole) if whole > 1 else None
    return {
        "baseline_batch_size": b0,
        "memory_bytes": limit,
        "batch_size": b1,
        "batch_total_bytes": int(at_b1["total_bytes"]),
        "tried_larger": bool((method["batch_size"] > b1).any()),
        "baseline_s_per_sample": times[0],
        "same_batch_s_per_sample": times[1],
        "larger_batch_s_per_sample": times[2],
        "shared_pass_gain": shared,
        "larger_batch_gain": larger,
        "whole_gain": whole,
        "shared_pass_share": share,
        "larger_batch_share": None if share is None else math.log(larger) / math.log(whole),
    }


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    gains = [_times(row[name]) for name in ("shared_pass_gain", "larger_batch_gain", "whole_gain")]
    shares = [_percent(row[name]) for name in ("shared_pass_share", "larger_batch_share")]
    size = f"{row['memory_bytes'] / GIB:.4g}"
    largest = f"{'' if row['tried_larger'] else _UNTRIED.removesuffix(':')}{row['batch_size']}"
    return (str(row["baseline_batch_size"]), size, largest, *gains, *shares)


def _title(row: Mapping[Hashable, Any] | pd.Series[Any]) -> str:
    return str(row["method"] if pd.isna(row["method_title"]) else row["method_title"])


def _times(gain: float) -> str:
    return f"{gain:.2f}x"


def _percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.0f} %"
