"""The frames of phases: their seconds, their work, and the ceilings of the roofline plot.

The frame of records has, for each phase, ``{phase}_phase_s``, ``_kind``, ``_flops``, ``_bytes`` and ``_floor_s``, and
the ceilings ``matmul_flops_per_s``, ``copy_bytes_per_s`` and ``read_bytes_per_s``.
"""

from __future__ import annotations

import math

import pandas as pd

from rlhfreports.columns import is_measured
from rlhfreports.frames import line_of, size_of

_END = "_phase_s"
_MACHINE = ("host", "device", "dtype", "num_threads")
_SHARED = ["case_id", "method", "title", "line", "size", "seq_len", "batch_size", "machine"]


def phases_of(frame: pd.DataFrame) -> list[str]:
    """The phases that ``frame`` has columns for, in the order in which they run."""
    return [name.removesuffix(_END) for name in frame.columns if name.endswith(_END)]


def phase_points(frame: pd.DataFrame) -> pd.DataFrame:
    """Time and work of each phase of every measured case.

    Args:
        frame: a frame of ``rlhfbench.records_frame``.

    Returns:
        A row a case and phase: ``case_id``, ``method``, ``title``, ``line``, ``size``, ``seq_len``, ``batch_size``,
        ``machine``, ``phase``, ``order`` (of the phase), ``seconds`` (of a step), ``seconds_per_sample`` (over the
        samples of all ranks), ``floor_s_per_sample``, ``floor_fraction``, ``intensity`` (FLOP/byte) and
        ``flops_per_s``. The last four are NaN for a phase whose work is not known.
    """
    measured = frame[is_measured(frame)]
    shared = measured.assign(
        title=measured["method_title"],
        # An empty frame takes the index of what it is assigned.
        line=line_of(frame).reindex(measured.index),
        size=size_of(frame).reindex(measured.index),
        machine=machine_of(frame).reindex(measured.index),
    )[_SHARED].drop_duplicates(["line", "size"], keep="last")  # two runs of a case would make a bar of both
    measured = measured.loc[shared.index]
    found = []
    for order, phase in enumerate(phases_of(frame)):
        seconds, flops, num_bytes, floor_s = (
            measured[f"{phase}_phase_{what}"].astype("float64") for what in ("s", "flops", "bytes", "floor_s")
        )
        samples = measured["global_batch_size"].astype("float64")
        rows = shared.assign(
            phase=phase.replace("_", " "),
            order=order,
            seconds=seconds,
            seconds_per_sample=seconds / samples,
            floor_s_per_sample=floor_s / samples,
            floor_fraction=floor_s / seconds,
            intensity=flops / num_bytes,
            flops_per_s=flops / seconds,
        )
        found.append(rows[seconds > 0])
    if not found:
        return shared.assign(phase=pd.Series(dtype="object")).iloc[:0]
    return pd.concat(found).sort_index(kind="stable").reset_index(drop=True)


def roofline_points(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``phase_points`` that logarithmic axes can show: those with FLOPs and bytes."""
    points = phase_points(frame)
    if points.empty:
        return points
    # A phase that moves no byte has no intensity: its point would stretch the ceilings to infinity.
    can_be_shown = (points["intensity"] > 0) & (points["intensity"] < math.inf) & (points["flops_per_s"] > 0)
    return points[can_be_shown].reset_index(drop=True)


def machine_of(frame: pd.DataFrame) -> pd.Series[str]:
    """The words that tell the ceilings of rows apart: host, device, dtype and threads that vary; else the device."""
    columns = [name for name in (*_MACHINE, "run") if name in frame and frame[name].nunique(dropna=False) > 1]
    texts = [
        " · ".join(
            f"{value} threads" if name == "num_threads" else str(value)
            for name, value in zip(columns or ["device"], row, strict=True)
            if not pd.isna(value)
        )
        for row in frame[columns or ["device"]].itertuples(index=False)
    ]
    return pd.Series(texts, index=frame.index, dtype="object")


def ceilings(frame: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    """The ceilings of the roofline plot as lines.

    A ceiling is the highest rate that any case of the machine measured. Memory has two: a copy writes as much as it
    reads, and a phase that mostly reads can be faster.

    Args:
        frame: a frame of ``rlhfbench.records_frame``.
        points: from ``roofline_points``; the lines are as wide as they, and at least as the ridge.

    Returns:
        Two rows a line: ``machine``, ``ceiling``, ``intensity``, ``flops_per_s`` and ``rate`` (as text).
    """
    rates = frame.assign(machine=machine_of(frame))
    rates = rates.groupby("machine", sort=False)[["matmul_flops_per_s", "copy_bytes_per_s", "read_bytes_per_s"]].max()
    rows = []
    for machine, rate in rates.dropna().iterrows():
        matmul, copy, read = map(float, rate)
        of_machine = points.loc[points["machine"] == machine, "intensity"]
        ridges = (matmul / copy, matmul / read)
        left = min(*of_machine, *ridges) / 2
        right = max(*of_machine, *ridges) * 2
        lines = {
            f"matmul {matmul / 1e9:.3g} GFLOP/s": ((min(ridges), matmul), (right, matmul)),
            f"read {read / 1e9:.3g} GB/s": ((left, read * left), (ridges[1], matmul)),
            f"copy {copy / 1e9:.3g} GB/s": ((left, copy * left), (ridges[0], matmul)),
        }
        rows += [
            (machine, name.split()[0], intensity, flops_per_s, name)
            for name, ends in lines.items()
            for intensity, flops_per_s in ends
        ]
    return pd.DataFrame(rows, columns=["machine", "ceiling", "intensity", "flops_per_s", "rate"])
