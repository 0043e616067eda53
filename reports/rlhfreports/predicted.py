"""Predicted memory against measured: case by case, and a table that names the worst row."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from rlhfreports.columns import axes_that_vary, axis_text, shared_axes_text
from rlhfreports.tables import ABSENT, GIB, markdown, outcome_word

SUMS = ("model", "activation", "total")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One sum of one case, predicted and measured.

    Attributes:
        case: the case in words: ``Hydra-PPO, 128 tokens, batch 4``.
        method: the name of its method.
        outcome: its outcome.
        kind: one of ``SUMS``.
        predicted_bytes: the prediction.
        measured_bytes: the measurement of the ledger, ``None`` where there is none.
    """

    case: str
    method: str
    outcome: str
    kind: str
    predicted_bytes: int
    measured_bytes: int | None

    @property
    def percent(self) -> float | None:
        """The error of the prediction in percent of the measurement, ``None`` without a measurement above 0."""
        if not self.measured_bytes:
            return None
        return (self.predicted_bytes - self.measured_bytes) / self.measured_bytes * 100


def has_predictions(frame: pd.DataFrame) -> bool:
    """True if any row of ``frame`` was planned."""
    return bool((frame["predicted_total_bytes"].notna() | frame["plan_error"].notna()).any())


def comparisons(frame: pd.DataFrame) -> list[Comparison]:
    """Every sum of every row of ``frame`` that has a prediction, in the order of the rows."""
    axes = axes_that_vary(frame)
    found = []
    predicted = frame[[f"predicted_{kind}_bytes" for kind in SUMS]].notna().all(axis=1)
    for row in frame[predicted].to_dict("records"):
        is_measured = row["outcome"] == "ok" and not any(pd.isna(row[f"{kind}_bytes"]) for kind in SUMS)
        found += [
            Comparison(
                case=_case_words(row, axes),
                method=row["method"],
                outcome=row["outcome"],
                kind=kind,
                predicted_bytes=int(row[f"predicted_{kind}_bytes"]),
                measured_bytes=int(row[f"{kind}_bytes"]) if is_measured else None,
            )
            for kind in SUMS
        ]
    return found


def worst(found: list[Comparison]) -> Comparison | None:
    """The comparison with the largest error in percent, the first of equals; ``None`` where nothing was measured."""
    measured = [comparison for comparison in found if comparison.percent is not None]
    return max(measured, key=lambda comparison: abs(comparison.percent or 0.0), default=None)


def worst_sentence(found: list[Comparison]) -> str:
    """A sentence that names the worst prediction and its error."""
    if not found:
        return "No case was predicted: there is nothing to compare with."
    farthest = worst(found)
    if farthest is None:
        return "No case was measured: there is nothing to compare with."
    return f"Farthest off: {farthest.case}, {farthest.kind} memory, {_percent(farthest.percent)}."


def predicted_markdown(frame: pd.DataFrame) -> str:
    """A Markdown table of each case and sum: predicted GiB, measured GiB and the error in percent."""
    found = comparisons(frame)
    head = ["case", *(f"{kind} {what}" for kind in SUMS for what in ("predicted GiB", "measured GiB", "off by"))]
    rows = [
        [
            found[i].case,
            *(
                cell
                for item in found[i : i + len(SUMS)]
                for cell in (_gib(item.predicted_bytes), _measured(item), _percent(item.percent))
            ),
        ]
        for i in range(0, len(found), len(SUMS))
    ]
    cells = pd.DataFrame(rows, columns=head, dtype="object")
    failed = frame[frame["plan_error"].notna()].to_dict("records")
    notes = [f"{_case_words(row, axes_that_vary(frame))}: no prediction: {row['plan_error']}" for row in failed]
    return markdown(cells, 1, shared_axes_text(frame), [worst_sentence(found)], notes)


def _measured(item: Comparison) -> str:
    return outcome_word(item.outcome) if item.measured_bytes is None else _gib(item.measured_bytes)


def _case_words(row: Mapping[Hashable, Any], axes: list[str]) -> str:
    """The case in words, with its value on every axis that varies: ``Hydra-PPO, 128 tokens (64+64), batch 4``."""
    words = [str(row["method_title"]), f"{row['seq_len']} tokens ({row['prompt_len']}+{row['completion_len']})"]
    words += [f"batch {row['batch_size']}", *(axis_text(axis, row[axis]) or f"no {axis}" for axis in axes)]
    return ", ".join(words)


def _gib(size: int) -> str:
    return f"{size / GIB:.4g}"


def _percent(percent: float | None) -> str:
    return ABSENT if percent is None else f"{percent:+.3f} %"
