from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from rlhfbench.measure.allocator import MAX_POINTS, allocator_curve, read_allocator_curve


def entry(action: str, size: int, time_us: int) -> dict[str, Any]:
    return {"action": action, "size": size, "time_us": time_us, "addr": 0, "stream": 0}


def snapshot(*entries: dict[str, Any], active: int, total: int) -> dict[str, Any]:
    """A snapshot of the second of two devices."""
    segments = [
        {"device": 0, "active_size": 10**9, "total_size": 10**9},
        {"device": 1, "active_size": active, "total_size": total},
    ]
    return {"segments": segments, "device_traces": [[entry("alloc", 10**9, 0)], list(entries)]}


HISTORY = snapshot(
    entry("segment_alloc", 64, 1_000_000),
    entry("alloc", 40, 1_000_001),
    entry("free_requested", 40, 1_000_002),
    entry("free_completed", 40, 2_000_000),
    entry("alloc", 8, 3_000_000),
    active=108,
    total=164,
)


def test_the_curve_is_counted_backwards_from_what_is_alive_at_the_end() -> None:
    assert allocator_curve(HISTORY, 1) == {
        "s": [0.0, 1e-6, 1.0, 2.0],
        "active_bytes": [100, 140, 100, 108],
        "reserved_bytes": [164, 164, 164, 164],
    }


def test_a_stretch_of_a_long_history_keeps_its_highest_point() -> None:
    entries = [
        entry(action, 7, 10 * i + k) for i in range(2000) for k, action in enumerate(("alloc", "free_completed"))
    ]
    curve = allocator_curve(snapshot(*entries, active=5, total=50), 1)
    assert len(curve["s"]) <= MAX_POINTS
    assert set(curve["active_bytes"]) == {12}


def test_a_device_without_history_has_no_curve(tmp_path: Path) -> None:
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(HISTORY))
    assert read_allocator_curve(path, "cuda:1")["active_bytes"][-1] == 108
    assert read_allocator_curve(path, "cuda:5") == {"s": [], "active_bytes": [], "reserved_bytes": []}
