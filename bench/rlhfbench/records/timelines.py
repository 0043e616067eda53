"""The timelines of a run or a plan: one JSON file a case, written whole or not at all, and read for the reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfbench.errors import RecordsError
from rlhfbench.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd


def timeline_path(folder: Path, case_id: str) -> Path:
    """The file of a case's timeline among the others in ``folder``."""
    return folder / f"{case_id}.json"


def write_timeline(folder: Path, case_id: str, timeline: dict[str, Any]) -> None:
    """Keeps the timeline of a case; see ``Timeline.to_dict`` for what is in it.

    Raises:
        RecordsError: it cannot be written.
    """
    path = timeline_path(folder, case_id)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(timeline, separators=(",", ":")) + "\n")
    except OSError as error:
        raise RecordsError(f"timeline '{path}' cannot be written: {error.strerror}.") from error


def read_timeline(folder: Path, case_id: str) -> dict[str, Any] | None:
    """The timeline of a case, or ``None`` where none was kept.

    Raises:
        RecordsError: the file is there and holds none, or cannot be read.
    """
    path = timeline_path(folder, case_id)
    try:
        timeline = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecordsError(f"timeline '{path}' cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise RecordsError(f"timeline '{path}' is not JSON.") from error
    if not isinstance(timeline, dict) or not {"phases", "events", "parts_bytes"} <= timeline.keys():
        raise RecordsError(f"timeline '{path}' holds no timeline (phases, events and parts_bytes).")
    return timeline


def timeline_frames(timeline: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The points and the phases of a timeline, as ``rlhfreports.timelines`` takes them."""
    import pandas as pd

    points = pd.DataFrame({"event": timeline["events"]}, dtype="int64")
    for part, sizes in timeline["parts_bytes"].items():
        points[f"{part}_bytes"] = sizes
    phases = [
        {"phase": " + ".join(row["names"]), "first_event": row["first_event"], "last_event": row["last_event"]}
        for row in timeline["phases"]
    ]
    return points, pd.DataFrame(phases, columns=["phase", "first_event", "last_event"])


def divided_timeline(timeline: dict[str, Any], divide: Callable[[dict[str, int]], dict[str, int]]) -> dict[str, Any]:
    """``timeline`` on one rank: each point's parts divided, and the highest found again among the points."""
    columns = timeline["parts_bytes"]
    points = [divide(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
    totals = [sum(parts.values()) for parts in points]
    highest = max(range(len(totals)), key=lambda i: totals[i])
    event = timeline["events"][highest]
    names = [
        name
        for stretch in timeline["phases"]
        if stretch["first_event"] < event <= stretch["last_event"]
        for name in stretch["names"]
    ]
    return {
        **timeline,
        "peak": {"event": event, "phase": names[0] if names else None, "total_bytes": totals[highest]},
        "parts_bytes": {part: [parts[part] for parts in points] for part in columns},
    }
