from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rlhfbench.errors import RecordsError
from rlhfbench.records.timelines import read_timeline, tensors_frame, timeline_frames, write_timeline

TIMELINE = {
    "num_events": 9,
    "phases": [
        {"names": ["score"], "first_event": 1, "last_event": 4},
        {"names": ["optimize", "score"], "first_event": 4, "last_event": 9},
    ],
    "peak": {"event": 2, "phase": "score", "total_bytes": 13},
    "events": [2, 7],
    "parts_bytes": {"base": [10, 4], "rollout": [3, 6]},
    "tensors": {
        "part": ["base", "rollout"],
        "bytes": [8, 2],
        "born_event": [1, 2],
        "first_event": [1, 2],
        "end_event": [3, 9],
        "shape": [[2, 1], []],
        "dtype": ["float32", "int16"],
        "op": ["aten.mm.default", None],
    },
}


def test_a_written_timeline_is_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "timelines"
    assert read_timeline(folder, "a") is None
    write_timeline(folder, "a", TIMELINE)
    assert read_timeline(folder, "a") == TIMELINE
    assert [path.name for path in folder.iterdir()] == ["a.json"]


WRONG = {**TIMELINE, "tensors": {**TIMELINE["tensors"], "bytes": ["many", 2]}}
SHORT = {**TIMELINE, "tensors": {**TIMELINE["tensors"], "bytes": [8]}}


OTHER = [{**TIMELINE, "phases": 3}, {**TIMELINE, "phases": [{}]}, {**TIMELINE, "parts_bytes": []}]
OTHER += [{**TIMELINE, "phases": [{**TIMELINE["phases"][0], "names": names}]} for names in ([1], 3, None, "score")]
OTHER += [{**TIMELINE, "events": [1]}]


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", '{"events": []}', *(json.dumps(wrong) for wrong in (WRONG, SHORT, *OTHER))]
)
def test_a_file_without_a_timeline_is_named_in_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RecordsError, match=r"^timeline '.*a\.json' .*\.$"):
        read_timeline(tmp_path, "a")


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RecordsError, match="cannot be written: No space left on device"):
        write_timeline(tmp_path, "a", TIMELINE)
    assert list(tmp_path.iterdir()) == []


def test_frames_of_points_and_phases() -> None:
    points, phases = timeline_frames(TIMELINE)
    assert points.to_dict("list") == {"event": [2, 7], "base_part_bytes": [10, 4], "rollout_part_bytes": [3, 6]}
    assert phases.to_dict("list") == {
        "phase": ["score", "optimize + score"],
        "first_event": [1, 4],
        "last_event": [4, 9],
    }


def test_the_frame_of_the_largest_tensors() -> None:
    frame = tensors_frame(TIMELINE)
    assert frame["shape"].tolist() == ["2 × 1", "scalar"]
    assert frame["bytes"].tolist() == [8, 2]
    assert frame["op"].isna().tolist() == [False, True]
    without = tensors_frame({key: value for key, value in TIMELINE.items() if key != "tensors"})
    assert (len(without), list(without.columns)) == (0, list(frame.columns))
