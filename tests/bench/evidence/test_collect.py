from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

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
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as it was then
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
    started, popen = [], module.subprocess.Popen
    monkeypatch.setattr(module.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    parts = collect(tmp_path / "out", request_of_all, [1, 2], 0.3)["parts"]
    assert started
    assert any(
        "-P" in process.args for process in started
    )  # a module of the user's must not replace the standard library's
    assert all(process.poll() is not None for process in started)
    assert parts["1"]["outcome"] == "timeout"
    assert parts["2"] == {"outcome": "no time", "wall_s": 0.0, "error": None}


def test_measurements_of_other_conditions_are_refused_and_keep_their_environment(
    request_of_all: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    monkeypatch.setattr(module, "_run_part", lambda *arguments: {"outcome": "done", "wall_s": 1.0, "error": None})
    before = collect(folder, request_of_all, [1], 600.0)["environment"]
    again = collect(folder, request_of_all, [2], 600.0)["environment"]
    assert again["started_at"] == before["started_at"]
    now = {**before, "host": "other", "source": {**before["source"], "commit": "new"}}
    monkeypatch.setattr(module.environment, "describe", lambda **arguments: now)
    kept = [(folder / name).read_bytes() for name in ("evidence.json", "report.md")]
    commit, host = before["source"]["commit"], before["host"]
    with pytest.raises(RunFolderError) as error:
        collect(folder, request_of_all, [3], 600.0)
    assert str(error.value) == (
        f"out '{folder}' was begun under other conditions: commit new instead of {commit}; host other instead of "
        f"{host}: name a new folder."
    )
    assert [(folder / name).read_bytes() for name in ("evidence.json", "report.md")] == kept


def test_a_part_that_is_cut_short_leaves_its_environment(
    request_of_all: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_run_part", run)
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "out", request_of_all, [1], 600.0)
    assert json.loads((tmp_path / "out" / "evidence.json").read_text())["environment"]["started_at"]


def test_a_folder_in_which_parts_run_is_refused(
    request_of_all: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, done = tmp_path / "out", {"outcome": "done", "wall_s": 1.0, "error": None}
    refused: list[str] = []

    def run(*arguments: Any) -> dict[str, Any]:
        with pytest.raises(RunFolderError) as error:
            collect(folder, request_of_all, [2], 600.0)
        refused.append(str(error.value))
        return done

    monkeypatch.setattr(module, "_run_part", run)
    assert collect(folder, request_of_all, [1], 600.0)["parts"] == {"1": done}
    assert refused == [f"out '{folder}' is in use: another rlhfbench is running in it."]
    monkeypatch.setattr(module, "_run_part", lambda *arguments: done)
    assert collect(folder, request_of_all, [2], 600.0)["parts"].keys() == {"1", "2"}


def test_a_part_is_blamed_with_what_it_said_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says = {"text": ""}

    class Process:
        def __init__(self, command: list[str], *, stdout: TextIO, **how: Any) -> None:
            stdout.write(says["text"])

        def wait(self, timeout_s: float) -> int:
            return 3

        def poll(self) -> int:
            return 3

    monkeypatch.setattr(module.subprocess, "Popen", Process)
    for text, error in (("no such thing\n", "no such thing"), ("", "exit code 3"), ("a\nb\n", "b")):
        says["text"] = text
        assert module._run_part(tmp_path, 1, 60.0)["error"] == error
    assert (tmp_path / "part-1.log").read_text() == "no such thing\na\nb\n"


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
    with pytest.raises(RunFolderError, match="that is not a request"):
        collect(folder, request_of_all, [], 1.0)
