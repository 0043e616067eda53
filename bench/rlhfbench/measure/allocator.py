"""The history of the CUDA allocator over one step: its snapshot as a file, and live bytes over time.

Not yet run on a GPU.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_MAX_ENTRIES = 100_000
MAX_POINTS = 1000
# Actions of the allocator's trace, by what they add to.
_ACTIVE = {"alloc": 1, "free_completed": -1}
_RESERVED = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}


def keeps_history() -> bool:
    """Returns whether the CUDA allocator keeps a history, as torch's own does; ``cudaMallocAsync`` has none."""
    return torch.cuda.get_allocator_backend() == "native"


@contextmanager
def allocator_history(path: Path) -> Iterator[None]:
    """Records the CUDA allocator's history over the block and writes its snapshot, for pytorch.org/memory_viz.

    Without frames of C++: looking up their names takes minutes.
    """
    torch.cuda.memory._record_memory_history(max_entries=_MAX_ENTRIES, stacks="python")
    try:
        yield
        torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def read_allocator_curve(path: Path, device: str | torch.device) -> dict[str, list[float]]:
    """``allocator_curve`` of a snapshot that ``allocator_history`` wrote."""
    snapshot = pickle.loads(path.read_bytes())  # of this process's own making
    return allocator_curve(snapshot, torch.device(device).index or 0)


def allocator_curve(snapshot: Mapping[str, Any], device_index: int) -> dict[str, list[float]]:
    """Live bytes over the recorded time, from a snapshot of ``torch.cuda.memory``.

    The snapshot tells what is alive at its end, and each change before: the curve is counted backwards.

    Returns:
        Columns: ``s`` (seconds since the first entry), ``active_bytes`` and ``reserved_bytes``. Of more than
        ``MAX_POINTS`` changes, each stretch of them keeps its highest point.
    """
    segments = [segment for segment in snapshot["segments"] if segment["device"] == device_index]
    active = sum(segment["active_size"] for segment in segments)
    reserved = sum(segment["total_size"] for segment in segments)
    traces = snapshot["device_traces"]
    entries = traces[device_index] if device_index < len(traces) else []
    points: list[tuple[float, int, int]] = []
    for entry in reversed(entries):
        added = _ACTIVE.get(entry["action"], 0), _RESERVED.get(entry["action"], 0)
        if any(added):
            points.append((entry["time_us"], active, reserved))
            active -= added[0] * entry["size"]
            reserved -= added[1] * entry["size"]
    points = _thinned(points[::-1])
    return {
        "s": [(point[0] - points[0][0]) / 1e6 for point in points],
        "active_bytes": [point[1] for point in points],
        "reserved_bytes": [point[2] for point in points],
    }


def _thinned(points: list[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    stretch = -(-len(points) // MAX_POINTS) or 1
    return [
        max(points[first : first + stretch], key=lambda point: point[1]) for first in range(0, len(points), stretch)
    ]
