from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhfbench.errors import RunFolderError
from rlhfbench.evidence import collect as module
from rlhfbench.evidence.collect import collect
from rlhfbench.evidence.parts import PARTS
from rlhfbench.evidence.request import Request
from rlhfbench.records.file import read_records
from rlhfkernels.ops.table import OPS

Evidence = tuple[Path, dict[str, Any]]


def test_a_part_that_fails_stops_no_other_and_none_needs_the_libraries_of_drawing(evidence: Evidence) -> None:
    folder, found = evidence
    logs = {number: (folder / f"part-{number}.log").read_text() for number in PARTS}
    outcomes = {number: found["parts"][str(number)]["outcome"] for number in PARTS}
    assert outcomes == {1: "failed", **dict.fromkeys(range(2, 8), "done")}, logs
    assert "no/such-model" in found["parts"]["1"]["error"]
    assert json.loads((folder / "evidence.json").read_text()) == json.loads(json.dumps(found))


def test_the_drawing_libraries_were_really_absent(without_drawing: None) -> None:
    for name in ("pandas", "matplotlib.pyplot", "tabulate", "altair", "vl_convert", "itables"):
        done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False)
        assert f"No module named '{name.partition('.')[0]}'" in done.stderr


def test_the_command_line_needs_no_drawing_library_and_no_installation(without_drawing: None) -> None:
    command = [sys.executable, "-m", "rlhfbench", "evidence", "--out", "none", "--parts", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "--parts has '8': it must be numbers from 1 to 7, joined by commas.\n"


def test_the_parts_leave_what_they_are_for(evidence: Evidence) -> None:
    folder, _ = evidence
    ops = json.loads((folder / "ops.json").read_text())
    assert ops.keys() == OPS.keys()
    for name, op in ops.items():
        for label in ("ours", "torch", "reference"):
            found = op["implementations"][label]
            assert found["error"] < 1e-5, (name, label)
            assert (found["gradient_error"] or 0) < 1e-5, (name, label)
            assert found["s"] > 0
    methods = read_records(folder / "runs" / "methods")
    assert {r["case"]["method"] for r in methods} == {"full", "lora", "dynamic-lora", "joined-hydra", "hydra"}
    assert {r["outcome"] for r in methods} == {"ok"}
    assert all(r["plan"]["total_bytes"] == r["memory"]["total_bytes"] for r in methods)
    assert {r["case"]["prompt_len"] for r in read_records(folder / "runs" / "lengths")} == {4}
    decode = json.loads((folder / "decode.json").read_text())
    assert [item["batch_size"] for key, item in decode.items() if key != "ceilings"] == [1, 2]
    settings = read_records(folder / "runs" / "settings")
    assert [r["case"]["options"]["engine"]["trunk"] for r in settings] == ["plain", "fast"] * 2
    assert {r["case"]["options"]["lora"]["r"] for r in settings} == {2}
    assert list((folder / "runs" / "profile" / "traces").rglob("*.json.gz"))


def test_what_is_done_is_not_done_again(
    evidence: Evidence, request_of_all: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = evidence
    ran: list[int] = []

    def run(folder: Path, number: int, left_s: float) -> dict[str, Any]:
        ran.append(number)
        return dict(found["parts"][str(number)])

    monkeypatch.setattr(module, "_run_part", run)
    assert collect(folder, request_of_all, PARTS, 600.0)["parts"] == found["parts"]
    assert ran == [1]  # the part that failed


def test_a_part_ends_with_its_time_and_the_next_is_not_begun(
    without_drawing: None, request_of_all: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MIN_PART_S", 0.01)
    # All of the time is left for the first part, however busy the machine is, and none for the second.
    clock = itertools.chain([0.0] * 3, itertools.repeat(1.0))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    parts = collect(tmp_path / "out", request_of_all, [1, 2], 0.3)["parts"]
    assert parts["1"]["outcome"] == "timeout"
    assert parts["2"] == {"outcome": "no time", "wall_s": 0.0, "error": None}


def test_a_folder_of_something_else_is_refused(request_of_all: Request, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="holds files of something else"):
        collect(tmp_path, request_of_all, [], 1.0)
    folder = tmp_path / "out"
    collect(folder, request_of_all, [], 1.0)
    other = dataclasses.replace(request_of_all, model="gpt2")
    with pytest.raises(RunFolderError, match="the evidence of another request"):
        collect(folder, other, [], 1.0)
    (folder / "request.json").write_text("[]")
    with pytest.raises(RunFolderError, match="that is no request"):
        collect(folder, request_of_all, [], 1.0)
