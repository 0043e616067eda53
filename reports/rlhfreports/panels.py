"""Division of rows into panels. ``rlhfreports.frames`` makes the frames of pictures from them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd

from rlhfreports.columns import IN_A_LINE, axes_that_vary, axis_text, has_splits, is_measured, with_short_options
from rlhfreports.once import once_per_frame


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One panel: the rows of one batch size, or of the largest batch that fits.

    Attributes:
        title: the axes that set its rows apart from those of other panels.
        points: the measured rows, at most one per method, setting, run and length.
        failures: the rows that were not measured, at most one per method, setting, run and length.
        shows_batch: the batch size differs from point to point.
    """

    title: str
    points: pd.DataFrame
    failures: pd.DataFrame
    shows_batch: bool = False


@once_per_frame
def panels_of(frame: pd.DataFrame) -> list[Panel]:
    """The panels of ``frame``: one per batch size and combination of the other axes that vary.

    So have the splits of one length into prompt and completion: a line has one point at a length.

    The settings of a method share a panel, and so do runs. Where the largest batch that fits differs, a last panel
    shows it for each line and length, as Figure 2 of Hydra-RLHF does.
    """
    frame = with_short_options(frame)
    axes = [axis for axis in axes_that_vary(frame) if axis not in IN_A_LINE]
    axes += ["prompt_len"] if has_splits(frame) else []
    groups = frame.groupby(axes, sort=False, dropna=False) if axes else [((), frame)]
    panels: list[Panel] = []
    for values, rows in groups:
        words = [
            f"prompt {value}" if axis == "prompt_len" else axis_text(axis, value) or f"no {axis}"
            for axis, value in zip(axes, values, strict=True)
        ]
        panels += _panels_of_group(rows, " · ".join(words))
    return panels


def _panels_of_group(rows: pd.DataFrame, words: str) -> list[Panel]:
    panels = [
        _panel(of_batch, _joined(words, f"batch {batch}")) for batch, of_batch in rows.groupby("batch_size", sort=True)
    ]
    largest = _largest_that_fit(rows)
    batches = largest["batch_size"].drop_duplicates()
    if len(batches) > 1:
        failures = _unmeasured(rows)
        names = _line_point(rows)
        seen = set(zip(*(largest[name] for name in names), strict=True))
        never = [key not in seen for key in zip(*(failures[name] for name in names), strict=True)]
        failures = failures[np.array(never, dtype=bool)].drop_duplicates(names)
        title = _joined(words, "largest batch that fits")
        panels.append(Panel(title=title, points=largest, failures=failures, shows_batch=True))
    return panels


def _panel(rows: pd.DataFrame, title: str) -> Panel:
    return Panel(title=title, points=rows[is_measured(rows)], failures=_unmeasured(rows))


def _unmeasured(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[~is_measured(rows)]


def _largest_that_fit(rows: pd.DataFrame) -> pd.DataFrame:
    measured = rows[is_measured(rows)].sort_values("batch_size", kind="stable")
    return measured.drop_duplicates(_line_point(rows), keep="last")


def _line_point(rows: pd.DataFrame) -> list[str]:
    """The columns that tell the points of all lines of a panel apart."""
    return ["method", *(axis for axis in IN_A_LINE if axis in rows), "seq_len"]


def _joined(*words: str) -> str:
    return " · ".join(word for word in words if word)
