from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from rlhfbench.errors import RecordsError
from rlhfbench.records.profiles import profile_frames, read_profile

PROFILE: dict[str, Any] = {
    "case_id": "a",
    "device": "cuda",
    "phases": [
        {
            "phase": "generate",
            "trace": "a-generate.json.gz",
            "wall_s": 2.0,
            "num_ops": 3,
            "ops": [{"name": "aten::mm", "kind": "torch op", "count": 3, "self_s": 0.5, "device_s": 1.0}],
            "kernels": [{"name": "gemm", "count": 3, "device_s": 1.0}],
            "outside_s": 0.25,
            "stacks": {
                "wall_s": 3.0,
                "name": ["f", "g"],
                "kind": ["Python", "Python"],
                "parent": [-1, 0],
                "total_s": [1.0, 0.5],
                "device_s": [0.0, 0.0],
                "count": [1, 2],
            },
        },
        {
            "phase": "optimize",
            "trace": None,
            "wall_s": 1.0,
            "num_ops": 0,
            "ops": [],
            "kernels": [],
            "outside_s": 1.0,
            "stacks": None,
        },
    ],
    "allocator": {"s": [0.0, 1.0], "active_bytes": [1, 2], "reserved_bytes": [4, 4]},
}


def write(folder: Path, text: str) -> None:
    (folder / "a").mkdir(exist_ok=True)
    (folder / "a" / "profile.json").write_text(text)


def test_a_profile_is_read(tmp_path: Path) -> None:
    assert read_profile(tmp_path, "a") is None
    write(tmp_path, json.dumps(PROFILE))
    assert read_profile(tmp_path, "a") == PROFILE


def changed(path: str, value: Any) -> str:
    profile = copy.deepcopy(PROFILE)
    *keys, last = path.split(".")
    node: Any = profile
    for key in keys:
        node = node[int(key) if isinstance(node, list) else key]
    node[int(last) if isinstance(node, list) else last] = value
    return json.dumps(profile)


WRONG = [
    ("phases", None),
    ("phases.0", 1),
    ("phases.0.phase", None),
    ("phases.0.trace", "../../../etc/passwd"),
    ("phases.0.wall_s", "long"),
    ("phases.0.ops", {}),
    ("phases.0.ops.0.count", 1.5),
    ("phases.0.kernels.0", "gemm"),
    ("phases.0.stacks.parent", [-1, 1]),
    ("phases.0.stacks.parent", [-1]),
    ("phases.0.stacks.name.0", None),
    ("allocator.active_bytes", [1]),
    ("allocator", [1]),
]


@pytest.mark.parametrize("text", ["{", "[]", "{}", *(changed(path, value) for path, value in WRONG)])
def test_a_file_without_a_profile_is_named_in_one_sentence(tmp_path: Path, text: str) -> None:
    write(tmp_path, text)
    with pytest.raises(RecordsError, match=r"^profile '.*profile\.json' (is not JSON|holds no profile).*\.$"):
        read_profile(tmp_path, "a")


def test_a_profile_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "a" / "profile.json").mkdir(parents=True)
    with pytest.raises(RecordsError, match="cannot be read: Is a directory"):
        read_profile(tmp_path, "a")


def test_frames_of_a_profile() -> None:
    frames = profile_frames(PROFILE)
    assert frames["phases"].to_dict("list")["wall_s"] == [2.0, 1.0]
    assert frames["phases"]["trace"].isna().tolist() == [False, True]
    assert frames["ops"].to_dict("records") == [
        {"phase": "generate", "name": "aten::mm", "kind": "torch op", "count": 3, "self_s": 0.5, "device_s": 1.0}
    ]
    assert frames["kernels"].to_dict("records") == [{"phase": "generate", "name": "gemm", "count": 3, "device_s": 1.0}]
    assert frames["stacks"][["phase", "row", "name", "parent", "count"]].to_numpy().tolist() == [
        ["generate", 0, "f", -1, 1],
        ["generate", 1, "g", 0, 2],
    ]
    assert frames["allocator"].to_dict("list") == PROFILE["allocator"]


def test_a_phase_may_lack_its_stacks(tmp_path: Path) -> None:
    profile = copy.deepcopy(PROFILE)
    del profile["phases"][1]["stacks"]
    write(tmp_path, json.dumps(profile))
    found = read_profile(tmp_path, "a")
    assert found is not None
    assert profile_frames(found)["stacks"]["phase"].tolist() == ["generate", "generate"]


def test_a_profile_without_ops_and_stacks_gives_empty_frames() -> None:
    frames = profile_frames({"phases": [], "allocator": None})
    assert {name: len(frame) for name, frame in frames.items()} == dict.fromkeys(frames, 0)
    assert list(frames["ops"]) == ["phase", "name", "kind", "count", "self_s", "device_s"]
