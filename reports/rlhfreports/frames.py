"""The frames that pictures are drawn from: one row per point, made from the frame of a run's records.

The pictures of matplotlib and the charts of the page read these and no records, so both show the same numbers. Every
frame has the columns ``method``, ``title`` (of the method), ``line`` (the title with the setting and the run where
these vary), ``seq_len`` and ``batch_size``, and ``setting`` and ``run`` where these vary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from rlhfreports.columns import (
    CONDITIONS,
    HOST,
    IN_A_LINE,
    axes_that_vary,
    axis_text,
    has_splits,
    parts_of,
    with_short_options,
)
from rlhfreports.fits import SLOPE_COLUMNS, slope_by_length
from rlhfreports.once import once_per_frame
from rlhfreports.panels import Panel, panels_of
from rlhfreports.predicted import comparisons
from rlhfreports.ratios import t_quantile
from rlhfreports.tables import GIB

KINDS = ("total", "inference", "update")  # of seconds
LORA_RANK = "LoRA rank"
# Kinds of memory, by column.
MEMORY = {
    "total_bytes": "total",
    "model_bytes": "model",
    "activation_bytes": "activation",
    "process_peak_bytes": "whole process",
}


def of_memory(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` without the axes that memory hardly depends on: machines and their conditions."""
    return frame.drop(columns=[HOST, CONDITIONS], errors="ignore")


def line_of(frame: pd.DataFrame) -> pd.Series[str]:
    """The line of each row: the title of its method, with its setting and run where these vary."""
    line = frame["method_title"].astype(str)
    for axis in axes_that_vary(frame):
        if axis in IN_A_LINE:
            line = line + ", " + frame[axis].fillna("").astype(str)
    return line


def size_of(frame: pd.DataFrame) -> pd.Series[str]:
    """The words that rows of one bar chart share: ``128 tokens, batch 4``, with every other axis that varies."""
    length = frame["seq_len"].astype(str) + " tokens"
    if has_splits(frame):
        length = frame["prompt_len"].astype(str) + "+" + frame["completion_len"].astype(str) + " tokens"
    return length + ", batch " + frame["batch_size"].astype(str) + _axes(frame)


def _panel_of(frame: pd.DataFrame) -> pd.Series[str]:
    """The words that the rows of one panel share, in which a line has one point at a length."""
    words = "batch " + frame["batch_size"].astype(str)
    if has_splits(frame):
        words = words + ", prompt " + frame["prompt_len"].astype(str)
    return words + _axes(frame)


def _axes(frame: pd.DataFrame) -> pd.Series[str]:
    """The other axes that vary, each after a comma."""
    frame = with_short_options(frame)
    words = pd.Series("", index=frame.index, dtype="string")
    for axis in axes_that_vary(frame):
        if axis not in IN_A_LINE:
            words = words + ", " + frame[axis].map(lambda value, axis=axis: axis_text(axis, value) or f"no {axis}")
    return words.astype(str)


def _shared(rows: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "method": rows["method"],
            "title": rows["method_title"],
            "seq_len": rows["seq_len"],
            "batch_size": rows["batch_size"],
        }
    )


@once_per_frame
def times(frame: pd.DataFrame) -> pd.DataFrame:
    """Seconds per sample of every measured case, by panel and kind.

    Args:
        frame: a frame of ``rlhfbench.records_frame``; see ``rlhfreports.columns``.

    Returns:
        ``panel``, ``kind`` (one of ``KINDS``), ``seconds`` per sample, ``low`` and ``high`` (the ends of its 95 %
        interval, both ``seconds`` without one), ``tokens`` of a sample (``seq_len`` for each of its sequences), and
        ``shows_batch``: the panel is that of the largest batch that fits, where each point has its own.
    """
    found = []
    for panel in panels_of(frame):
        rows = panel.points
        tokens = (rows["seq_len"] * rows["sequences_per_sample"].fillna(1)).astype("float64")
        for kind in KINDS:
            timed = _timed(rows, kind)
            # An empty frame would take the index of all rows.
            of_panel = timed.assign(
                panel=panel.title, tokens=tokens.reindex(timed.index), shows_batch=panel.shows_batch
            )
            found.append(of_panel.assign(kind=kind))
    return _with_lines(frame, found, ("panel", "kind", "seconds", "low", "high", "tokens", "shows_batch"))


def _timed(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The rows with a time of that kind, with ``seconds``, ``low`` and ``high``."""
    seconds = rows[f"{kind}_s_per_sample"].astype("float64")
    width = rows[f"{kind}_half_width_s_per_sample"].astype("float64").fillna(0.0)
    # A logarithmic axis has no 0: an interval that reaches it ends at a tenth of the point.
    low, high = np.maximum(seconds - width, seconds / 10), seconds + width
    return _shared(rows).assign(seconds=seconds, low=low, high=high)[(seconds > 0) & np.isfinite(seconds)]


def costs(frame: pd.DataFrame) -> pd.DataFrame:
    """Memory and time of every measured case: ``size`` (``size_of``), ``gib``, ``seconds``, ``low`` and ``high``."""
    rows = frame[_has_memory(frame)]
    timed = _timed(rows, "total")
    sizes = size_of(rows).reindex(timed.index) if len(timed) else None
    gib = rows["total_bytes"].astype("float64").reindex(timed.index) / GIB
    return _with_lines(frame, [timed.assign(size=sizes, gib=gib)], ("size", "gib", "seconds", "low", "high"))


def panel_titles(frame: pd.DataFrame) -> list[str]:
    """The panels of ``times`` and ``failures``, in their order."""
    return [panel.title for panel in panels_of(frame)]


def slopes(frame: pd.DataFrame) -> pd.DataFrame:
    """The slope of every line: ``panel``, ``kind``, ``title``, ``line``, ``slope`` and ``half_width``."""
    found = []
    lines = line_of(frame)
    for panel in panels_of(frame):
        points = panel.points[["method", "method_title", *SLOPE_COLUMNS]]
        for line, rows in points.groupby(lines.reindex(points.index), sort=False):
            title = rows["method_title"].iloc[0]
            for kind in KINDS:
                fitted = slope_by_length(rows, f"{kind}_s_per_sample")
                if fitted is not None:
                    found.append((panel.title, kind, title, line, *fitted))
    return pd.DataFrame(found, columns=["panel", "kind", "title", "line", "slope", "half_width"])


@once_per_frame
def failures(frame: pd.DataFrame) -> pd.DataFrame:
    """The cases that were not measured, by panel: ``panel``, ``outcome`` and ``error``."""
    found = [_of_failures(panel) for panel in panels_of(frame)]
    return _with_lines(frame, found, ("panel", "outcome", "error"))


def _of_failures(panel: Panel) -> pd.DataFrame:
    rows = panel.failures
    return _shared(rows).assign(panel=panel.title, outcome=rows["outcome"], error=rows["error"])


def _with_lines(frame: pd.DataFrame, found: Sequence[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """The rows of ``found``, which have the index of ``frame``, with their lines."""
    filled = [rows for rows in found if len(rows)]
    if not filled:
        return pd.DataFrame(columns=["method", "title", "line", "seq_len", "batch_size", *columns])
    joined = pd.concat(filled)
    joined["line"] = line_of(frame).reindex(joined.index)
    for axis in axes_that_vary(frame):
        if axis in IN_A_LINE:
            joined[axis] = frame[axis].reindex(joined.index)
    return joined.reset_index(drop=True)


def parts(frame: pd.DataFrame) -> pd.DataFrame:
    """Memory by part at the step's highest total: ``size`` (``size_of``), ``part``, its ``place``, and ``gib``."""
    frame = of_memory(frame)
    # In the words of all cases, as those that failed stand in the same chart.
    cases = frame.assign(line=line_of(frame), size=size_of(frame))[_has_memory(frame)]
    rows = cases.drop_duplicates(["line", "size"], keep="last")  # two runs of a case would make a bar of both
    found = [
        _shared(rows).assign(
            size=rows["size"],
            part=part.replace("_", " "),
            place=place,
            gib=rows[f"{part}_part_bytes"].astype("float64") / GIB,
        )
        for place, part in enumerate(parts_of(frame))
    ]
    return _with_lines(frame, [of_part[of_part["gib"] > 0] for of_part in found], ("size", "part", "place", "gib"))


def memory(frame: pd.DataFrame) -> pd.DataFrame:
    """Memory of every case: ``panel`` (its batch size and axes), ``what`` (a value of ``MEMORY``) and ``gib``."""
    frame = of_memory(frame)
    rows = frame[_has_memory(frame)]
    found = []
    for column, what in MEMORY.items():
        gib = rows[column].astype("float64") / GIB
        panel = _panel_of(rows) if len(rows) else None
        found.append(_shared(rows).assign(panel=panel, what=what, gib=gib)[gib > 0])
    return _with_lines(frame, found, ("panel", "what", "gib"))


def swept(frame: pd.DataFrame) -> pd.DataFrame:
    """Total memory against each number that a sweep varies beside lengths and batches: LoRA rank, numeric options.

    Returns:
        ``axis`` (the name of the number), ``value``, ``size`` (``size_of``, without that axis) and ``gib``; only lines
        and sizes that were measured at two values. A row whose option has the value of its setting does not name it, so
        it is left out.
    """
    frame = of_memory(frame)
    rows = frame[_has_memory(frame)]
    values = {LORA_RANK: rows["lora_rank"].astype("Float64"), **_numeric_options(rows)}
    gib, lines = rows["total_bytes"].astype("float64") / GIB, line_of(frame).reindex(rows.index)
    found = []
    for axis, value in values.items():
        if value.nunique() < 2:
            continue
        of_axis = _shared(rows).assign(axis=axis, value=value, size=size_of(_without(rows, axis)), gib=gib)[
            value.notna()
        ]
        num_values = of_axis.groupby([lines.reindex(of_axis.index), "size"])["value"].transform("nunique")
        found.append(of_axis[num_values > 1].sort_values("value", kind="stable"))
    return _with_lines(frame, found, ("axis", "value", "size", "gib"))


def _without(rows: pd.DataFrame, axis: str) -> pd.DataFrame:
    """``rows`` as if none differed on an axis of ``swept``."""
    if axis == LORA_RANK:
        return rows.assign(lora_rank=rows["lora_rank"].iloc[0])
    others = [", ".join(f"{n}={v}" for n, v in _pairs(text) if n != axis) for text in rows["options"].fillna("")]
    return rows.assign(options=pd.array(others, dtype="string"))


def _numeric_options(rows: pd.DataFrame) -> dict[str, pd.Series[float]]:
    """The options of rows whose values are numbers, from words such as ``ppo.num_ppo_epochs=4, lora.alpha=2``."""
    words = rows["options"].fillna("").astype(str).map(lambda text: dict(_pairs(text)))
    names = sorted({name for row in words for name in row})
    return {name: pd.to_numeric(words.map(lambda row, name=name: row.get(name)), errors="coerce") for name in names}


def _pairs(text: str) -> list[tuple[str, str]]:
    pairs = (word.partition("=") for word in text.split(", "))
    return [(name, value) for name, sign, value in pairs if sign]


def predicted(frame: pd.DataFrame) -> pd.DataFrame:
    """Predicted and measured memory: ``case``, ``kind``, ``predicted_gib``, ``measured_gib``, ``percent`` (error)."""
    titles = dict(zip(frame["method"], frame["method_title"], strict=True))
    rows = [
        {
            "method": item.method,
            "title": titles[item.method],
            "case": item.case,
            "kind": item.kind,
            "predicted_gib": item.predicted_bytes / GIB,
            "measured_gib": (item.measured_bytes or 0) / GIB,
            "percent": item.percent,
        }
        for item in comparisons(frame)
        if item.measured_bytes and item.predicted_bytes > 0
    ]
    names = ("method", "title", "case", "kind", "predicted_gib", "measured_gib", "percent")
    return pd.DataFrame(rows, columns=list(names))


def block_times(frame: pd.DataFrame, blocks: pd.DataFrame) -> pd.DataFrame:
    """The blocks of a run over its wall time.

    Args:
        frame: the records.
        blocks: one row per block: ``case_id``, ``block``, ``started_at``, ``total_s_per_sample``, ``other_cpu_share``,
            ``steal_share``, ``waiting_share``, ``cpu_mhz``, ``disturbed_by`` and ``error``.

    Returns:
        The blocks that were timed: ``title``, ``line``, ``size``, ``block``, ``minutes`` since the first of them,
        ``percent`` (the block's seconds against the median of its case), ``others`` (the share of the machine that
        others took, in percent), ``mhz`` and ``disturbed_by``.
    """
    names = ["title", "line", "size", "block", "minutes", "percent", "others", "mhz", "disturbed_by"]
    timed = blocks[blocks["total_s_per_sample"].notna()] if len(blocks) else blocks
    if not len(timed):
        return pd.DataFrame(columns=names)
    words = pd.DataFrame(
        {
            "title": frame["method_title"].to_numpy(),
            "line": line_of(frame).to_numpy(),
            "size": size_of(frame).to_numpy(),
        },
        index=frame["case_id"].to_numpy(),
    )
    words = words[~words.index.duplicated()]
    joined = timed.join(words, on="case_id")
    started = pd.to_datetime(joined["started_at"], utc=True, errors="coerce", format="ISO8601")
    seconds = joined["total_s_per_sample"].astype("float64")
    share = joined["other_cpu_share"].fillna(0).astype("float64") + joined["steal_share"].fillna(0).astype("float64")
    return joined.assign(
        minutes=(started - started.min()).dt.total_seconds() / 60,
        percent=100 * (seconds / seconds.groupby(joined["case_id"]).transform("median") - 1),
        others=100 * share,
        mhz=joined["cpu_mhz"],
    )[names].reset_index(drop=True)


def drift(blocks: pd.DataFrame) -> tuple[float, float] | None:
    """Percent by which blocks became slower from the run's first to its last, with half of the 95 % interval.

    A line through the blocks of each case, all with one slope: cases differ in their times and in when they ran.

    Args:
        blocks: from ``block_times``.

    Returns:
        ``None`` where no case has blocks enough.
    """
    of_case = blocks.assign(case=blocks["line"] + blocks["size"])[["case", "minutes", "percent"]].dropna()
    means = of_case.groupby("case")[["minutes", "percent"]].transform("mean")
    x, y = ((of_case[name] - means[name]).to_numpy(dtype=float) for name in ("minutes", "percent"))
    degrees = len(of_case) - of_case["case"].nunique() - 1
    if degrees < 1 or not (x**2).sum() > 0:
        return None
    slope = (x * y).sum() / (x**2).sum()
    error = math.sqrt(((y - slope * x) ** 2).sum() / degrees / (x**2).sum())
    span = float(of_case["minutes"].max() - of_case["minutes"].min())
    return float(slope * span), t_quantile(degrees) * error * span


def _has_memory(frame: pd.DataFrame) -> pd.Series[bool]:
    is_ok = (frame["outcome"] == "ok").fillna(False).astype(bool)
    return is_ok & frame["total_bytes"].notna()
