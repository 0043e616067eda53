"""Timelines of a run or a plan: one JSON file per case, written atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfbench.errors import RecordsError
from rlhfbench.files import write_atomically
from rlhfbench.records.json_files import are_columns, are_rows, frame_of, read_json, rows_of

if TYPE_CHECKING:
    import pandas as pd

# The columns of the largest storages, each with its dtype. Timelines from before storages were named have none.
_TENSORS = {
    "part": "string",
    "bytes": "Int64",
    "born_event": "Int64",
    "first_event": "Int64",
    "end_event": "Int64",
    "shape": "list",
    "dtype": "string",
    "op": "string",
}
_PHASE = {"names": "object", "first_event": "Int64", "last_event": "Int64"}
_MADE_BEFORE = ("op",)  # absent for a storage that is older than the ledger


def planned(case_id: str) -> str:
    """The name, beside that of the measured one, of the timeline that a plan of the case predicts."""
    return f"{case_id}-plan"


def timeline_path(folder: Path, case_id: str) -> Path:
    """The file of a case's timeline in ``folder``."""
    return folder / f"{case_id}.json"


def write_timeline(folder: Path, case_id: str, timeline: dict[str, Any]) -> None:
    """Writes the timeline of a case, as ``Timeline.to_dict`` returns it.

    Raises:
        RecordsError: the file cannot be written.
    """
    path = timeline_path(folder, case_id)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(timeline, separators=(",", ":")) + "\n")
    except OSError as error:
        raise RecordsError(f"timeline '{path}' cannot be written: {error.strerror}.") from error


def read_timeline(folder: Path, case_id: str) -> dict[str, Any] | None:
    """Returns the timeline of a case, ``None`` if it has no file.

    Raises:
        RecordsError: the file cannot be read or holds no timeline.
    """
    path = timeline_path(folder, case_id)
    timeline = read_json(path, "timeline")
    if timeline is None:
        return None
    if (
        not isinstance(timeline, dict)
        or not {"phases", "events", "parts_bytes"} <= timeline.keys()
        or not _fit(timeline)
    ):
        raise RecordsError(f"timeline '{path}' holds no timeline (phases, events and parts_bytes).")
    return timeline


def _fit(timeline: dict[str, Any]) -> bool:
    parts, phases = timeline["parts_bytes"], timeline["phases"]
    if (
        not isinstance(parts, dict)
        or not are_rows(phases, _PHASE)
        or not all(_PHASE.keys() <= row.keys() for row in phases)
    ):
        return False
    names = [row["names"] for row in phases]
    if not all(isinstance(each, list) and all(isinstance(name, str) for name in each) for each in names):
        return False
    points = {"event": timeline["events"], **parts}
    return are_columns(points, dict.fromkeys(points, "Int64")) and _tensors_fit(timeline)


def _tensors_fit(timeline: dict[str, Any]) -> bool:
    return timeline.get("tensors") is None or are_columns(timeline["tensors"], _TENSORS, optional=_MADE_BEFORE)


def tensors_frame(timeline: dict[str, Any]) -> pd.DataFrame:
    """The largest storages of a timeline as a frame for ``rlhfreports.page.timeline``, empty where none are recorded.

    Returns:
        ``part``, ``bytes``, ``born_event``, ``first_event``, ``end_event``, ``shape`` (as text), ``dtype`` and ``op``.
    """
    rows = rows_of(timeline.get("tensors"), _TENSORS)
    worded = [{**row, "shape": " × ".join(map(str, row["shape"])) or "scalar"} for row in rows]
    return frame_of(worded, {**_TENSORS, "shape": "string"})


def timeline_frames(timeline: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The points and the phases of a timeline as frames for ``rlhfreports.timelines``."""
    import pandas as pd

    points = pd.DataFrame({"event": timeline["events"]}, dtype="int64")
    for part, sizes in timeline["parts_bytes"].items():
        points[f"{part}_part_bytes"] = sizes
    phases = [
        {"phase": " + ".join(row["names"]), "first_event": row["first_event"], "last_event": row["last_event"]}
        for row in timeline["phases"]
    ]
    return points, pd.DataFrame(phases, columns=["phase", "first_event", "last_event"])
