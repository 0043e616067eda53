from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhfbench.measure import profile as module
from rlhfbench.measure.profile import PhaseProfiler, profile_step
from rlhfbench.records.profiles import read_profile
from rlhfkernels.observer import Observer
from rlhfkernels.ops.native import build
from rlhfkernels.ops.native import matmul as native


def events_of(path: Path) -> set[str]:
    return {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}


def test_a_phase_has_one_trace_of_its_first_stretch(tmp_path: Path) -> None:
    x = torch.ones(4, 4)
    profiler = PhaseProfiler(tmp_path / "traces", "abc")
    for _ in range(2):
        with profiler.phase("generate"):
            x.exp()
        with profiler.phase("score"), profiler.phase("inner"):
            x.sin()
    paths = [trace.path for trace in profiler.traces.values()]
    assert paths == [tmp_path / "traces" / f"abc-{name}.json.gz" for name in ("generate", "score", "inner")]
    assert sorted(paths) == sorted((tmp_path / "traces").iterdir())
    names = [events_of(path) for path in paths]
    assert ["aten::exp" in found for found in names] == [True, False, False]
    assert ["aten::sin" in found for found in names] == [False, True, True]
    assert all(trace.wall_s > 0 for trace in profiler.traces.values())


def step(observer: Observer) -> None:
    x = torch.ones(32, 32)
    with observer.phase("generate"):
        for _ in range(20):
            helper(x)
    with observer.phase("optimize"):
        x.sin()


def helper(x: torch.Tensor) -> torch.Tensor:
    return x @ x


def profiled(tmp_path: Path, run: Any = step) -> dict[str, dict[str, Any]]:
    profile_step(run, tmp_path / "abc", "abc", "cpu")
    profile = read_profile(tmp_path, "abc")
    assert profile is not None
    assert profile["allocator"] is None
    return {phase["phase"]: phase for phase in profile["phases"]}


def test_a_profile_has_the_ops_and_the_stacks_of_each_phase(tmp_path: Path) -> None:
    phases = profiled(tmp_path)
    assert list(phases) == ["generate", "optimize"]
    counts = {row["name"]: row["count"] for row in phases["generate"]["ops"]}
    assert counts["aten::mm"] == 20
    assert "aten::sin" not in counts
    names = phases["generate"]["stacks"]["name"]
    assert any(name.endswith(": helper") for name in names)
    assert not any("observer.py" in name or "profiler" in name for name in names)
    assert phases["generate"]["trace"] == "abc-generate.json.gz"
    assert sorted(path.name for path in (tmp_path / "abc").iterdir()) == [
        "abc-generate.json.gz",
        "abc-optimize.json.gz",
        "profile.json",
    ]


def test_a_phase_of_many_ops_has_no_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OPS_WITH_STACKS", 10)
    phases = profiled(tmp_path)
    assert phases["generate"]["num_ops"] > 10
    assert phases["generate"]["stacks"] is None
    assert phases["optimize"]["stacks"]["name"]


@pytest.mark.skipif(build.unavailable_reason() is not None, reason="the ops in C cannot be built here")
def test_ops_in_c_have_their_names_while_profiled_only(tmp_path: Path) -> None:
    x = torch.ones(64, 64)
    native.matmul(x, x, torch.empty(64, 64))
    before = build.library().run_program

    def run(observer: Observer) -> None:
        with observer.phase("generate"):
            native.matmul(x, x, torch.empty(64, 64))

    phases = profiled(tmp_path, run)
    assert {row["name"] for row in phases["generate"]["ops"] if row["kind"] == "native op"} == {"matmul"}
    assert "matmul" in phases["generate"]["stacks"]["name"]
    assert build.library().run_program is before
