"""The frames that pictures are drawn from: one row per point, made from the frame of a run's records.

The pictures of matplotlib and the charts of the page read these, so both show the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from rlhfreports.columns import axes_that_vary, setting_order
from rlhfreports.panels import Panel, panels_of

KINDS = ("total", "inference", "update")


def line_of(frame: pd.DataFrame) -> pd.Series[str]:
    """The line of each row: the title of its method, with its setting and run where these vary."""
    line = frame["method_title"].fillna(frame["method"]).astype(str)
    if "setting" in axes_that_vary(frame):
        line = line + ", " + frame["setting"].fillna("").astype(str)
    if "run" in frame and frame["run"].nunique() > 1:
        line = line + ", " + frame["run"].astype(str)
    return line


def times(frame: pd.DataFrame) -> pd.DataFrame:
    """Seconds per sample of every measured case, by panel and kind.

    Args:
        frame: a frame of ``rlhfbench.records_frame``; see ``rlhfreports.columns``.

    Returns:
        ``panel``, ``method``, ``title``, ``family``, ``setting``, ``line``, ``seq_len``, ``batch_size``, ``kind`` (one
        of ``KINDS``), ``seconds`` per sample, ``low`` and ``high`` (the ends of its 95 % interval, ``seconds`` itself
        without one), and ``tokens`` of a sample.
    """
    return _by_panel(frame, panels_of(frame), failures=False)


def failures(frame: pd.DataFrame) -> pd.DataFrame:
    """The cases that were not measured, by panel.

    Returns:
        The columns of ``times`` as far as ``batch_size``, then ``outcome`` and ``error``.
    """
    return _by_panel(frame, panels_of(frame), failures=True)


def _by_panel(frame: pd.DataFrame, panels: Sequence[Panel], *, failures: bool) -> pd.DataFrame:
    found = []
    for panel in panels:
        rows = panel.failures if failures else panel.points
        shared = pd.DataFrame(
            {
                "panel": panel.title,
                "method": rows["method"],
                "title": rows["method_title"].fillna(rows["method"]),
                "family": rows["family"],
                "setting": rows["setting"],
                "seq_len": rows["seq_len"],
                "batch_size": rows["batch_size"],
            }
        )
        if failures:
            found.append(shared.assign(outcome=rows["outcome"], error=rows["error"]))
            continue
        tokens = rows["seq_len"] * rows["sequences_per_sample"].fillna(1)
        for kind in KINDS:
            seconds = rows[f"{kind}_s_per_sample"].astype("float64")
            width = rows[f"{kind}_half_width_s_per_sample"].astype("float64").fillna(0.0)
            of_kind = shared.assign(
                kind=kind,
                seconds=seconds,
                # A logarithmic axis has no 0: an interval that reaches it ends at a tenth of the point.
                low=np.maximum(seconds - width, seconds / 10),
                high=seconds + width,
                tokens=tokens,
            )
            found.append(of_kind[seconds > 0])
    lines = line_of(frame)
    joined = pd.concat(found) if found else pd.DataFrame(columns=["panel"])
    return joined.assign(line=lines.reindex(joined.index)).reset_index(drop=True)


def settings_that_vary(frame: pd.DataFrame) -> list[str]:
    """The settings of ``frame`` in their order, empty where there is one."""
    return setting_order(frame) if "setting" in axes_that_vary(frame) else []
