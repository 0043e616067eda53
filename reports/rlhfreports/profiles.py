"""The frames of profiles: top ops, and the rectangles of a flame chart.

A profile is a dictionary of frames as ``rlhfbench.records.profiles.profile_frames`` makes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import pandas as pd

Profile = Mapping[str, pd.DataFrame]

TOP = 12  # ops of a phase in the chart and the table
# A narrower rectangle is under a pixel of the chart.
MIN_SHARE = 0.002
_NAME_CHARS = 70
_OP_COLUMNS = ["phase", "rank", "op", "kind", "count", "seconds", "share"]
_PYTHON_FRAME = re.compile(r"^(?:.*/)?([^/]+)\((\d+)\): (.+)$")
_NO_OPS = "Python, in no op"


def on_device(profile: Profile) -> bool:
    """True if a kernel ran on a device: its seconds count then, and not those of the CPU that waits."""
    return bool((profile["ops"]["device_s"] > 0).any())


def top_ops(profile: Profile) -> pd.DataFrame:
    """The ops of each phase with the most time, and the time in no op.

    Returns:
        ``phase``, ``rank`` (0 for the largest op of the phase), ``op``, ``kind``, ``count``, ``seconds`` (without the
        ops that it calls; of a device's kernels where there are some) and ``share`` of the phase.
    """
    column = "device_s" if on_device(profile) else "self_s"
    rows = []
    for phase in profile["phases"].to_dict("records"):
        ops = profile["ops"]
        found = [
            (row["name"], row["kind"], row["count"], row[column])
            for row in ops[ops["phase"] == phase["phase"]].to_dict("records")
        ]
        if column == "self_s" and not pd.isna(phase["outside_s"]):
            found.append((_NO_OPS, "Python", None, phase["outside_s"]))
        largest = sorted((row for row in found if row[3] > 0), key=lambda row: -row[3])[:TOP]
        rows += [(phase["phase"], rank, *row, _share(row[3], phase["wall_s"])) for rank, row in enumerate(largest)]
    return _named(pd.DataFrame(rows, columns=_OP_COLUMNS))


def kernels(profile: Profile) -> pd.DataFrame:
    """The kernels of each phase with the most time, in the columns of ``top_ops``; empty on a CPU."""
    rows = []
    for phase in profile["phases"].to_dict("records"):
        found = profile["kernels"][profile["kernels"]["phase"] == phase["phase"]].head(TOP)
        for rank, row in enumerate(found.to_dict("records")):
            share = _share(row["device_s"], phase["wall_s"])
            rows.append((phase["phase"], rank, row["name"], "kernel", row["count"], row["device_s"], share))
    return _named(pd.DataFrame(rows, columns=_OP_COLUMNS))


def _share(seconds: float, wall_s: object) -> float | None:
    return None if pd.isna(wall_s) or not wall_s else seconds / float(wall_s)  # type: ignore[call-overload, arg-type]


def flame_rects(profile: Profile) -> pd.DataFrame:
    """The rectangles of a flame chart, an icicle: callers above, callees below, as wide as their time.

    Returns:
        ``phase``, ``name``, ``kind``, ``count``, ``seconds``, ``share`` of the phase, ``depth`` (0 for a root), and the
        ends ``x0`` and ``x1`` in seconds. Seconds are of a device's kernels where there are some.
    """
    column = "device_s" if on_device(profile) else "total_s"
    rows: list[tuple[object, ...]] = []
    for phase in dict.fromkeys(profile["stacks"]["phase"]):
        calls = profile["stacks"][profile["stacks"]["phase"] == phase]
        places: dict[int, tuple[int, float]] = {}  # depth, and where the next child begins
        whole = float(calls.loc[calls["parent"] == -1, column].sum())
        next_root = 0.0
        for call in calls.to_dict("records"):
            seconds, parent = float(call[column]), int(call["parent"])
            if parent >= 0 and parent not in places:
                continue
            if not whole or seconds < MIN_SHARE * whole:
                continue
            depth, start = (0, next_root) if parent == -1 else places[parent]
            if parent == -1:
                next_root += seconds
            else:
                places[parent] = depth, start + seconds
            places[int(call["row"])] = depth + 1, start
            words = (call["name"], call["kind"], call["count"])
            rows.append((phase, *words, seconds, seconds / whole, depth, start, start + seconds))
    columns = ["phase", "name", "kind", "count", "seconds", "share", "depth", "x0", "x1"]
    return _named(pd.DataFrame(rows, columns=columns))


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with the words of phases as people read them."""
    return frame.assign(phase=frame["phase"].astype("object").map(lambda name: str(name).replace("_", " ")))


def function_first(name: str) -> str:
    """A Python frame ``folder/file.py(12): forward`` as ``forward · file.py:12``; other names as they are."""
    found = _PYTHON_FRAME.match(name)
    return name if found is None else f"{found[3]} · {found[1]}:{found[2]}"


def shorter(name: str) -> str:
    """``name`` cut in the middle to what an axis has room for: the file and the function stand at its ends."""
    if len(name) <= _NAME_CHARS:
        return name
    half = (_NAME_CHARS - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
