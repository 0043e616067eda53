from __future__ import annotations

import importlib.util
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from rlhfbench.errors import RecordsError, SweepError
from rlhfbench.records.file import RecordsFile, make_record, read_records
from rlhfbench.records.timelines import planned, write_timeline
from rlhfbench.runs.drawing import draw_run
from rlhfbench.runs.page import missing_libraries, read_run, run_names, write_run_page
from rlhfkernels.config.case import Case
from rlhfkernels.observer import PARTS

SCHEMA_1 = Path(__file__).parents[1] / "records" / "schema1.jsonl"
BLOCK = {
    "started_at": "2026-01-01T00:00:00+00:00",
    "prepare_s_per_sample": None,
    "phases": {"score": [0.5, 0.5]},
    "stopped_because": "precise",
    "interference": {"other_cpu_share": 0.5, "cpu_mhz": 2000.0},
    "error": None,
}


def write_run(folder: Path, *, seconds: float = 0.5) -> Case:
    case = Case(method="hydra", model="tiny", prompt_len=8, completion_len=8, batch_size=2)
    measured = {
        "memory": {"model_bytes": 2**30, "activation_bytes": 0, "rollout_bytes": 0, "total_bytes": 2**30},
        "latency": {
            "total_s_per_sample": seconds,
            "num_blocks": 1,
            "phases": {"score": {"kind": "inference"}},
        },
        "block": {**BLOCK, "phases": {"score": [seconds, seconds]}},
    }
    folder.mkdir(exist_ok=True)
    with RecordsFile(folder) as records:
        records.append(make_record(case, outcome="ok", error=None, measured=measured, started_at="now", wall_s=1.0))
    return case


def test_a_run_is_read_with_all_that_stands_beside_its_records(tmp_path: Path) -> None:
    case = write_run(tmp_path)
    sizes = {part: [0] for part in PARTS}
    phase = {"names": ["score"], "first_event": 0, "last_event": 1}
    write_timeline(tmp_path / "timelines", case.id, {"phases": [phase], "events": [1], "parts_bytes": sizes})
    (tmp_path / "environment.json").write_text(json.dumps({"host": "here", "resumed": [{"host": "there"}]}))
    (tmp_path / "sweep.toml").write_text('device = "cpu"\n')
    run = read_run(tmp_path)
    assert (run.name, run.sweep) == (tmp_path.name, 'device = "cpu"\n')
    assert [environment["host"] for environment in run.environments] == ["here", "there"]
    assert list(run.timelines) == [case.id]
    (block,) = run.blocks.to_dict("records")
    assert (block["case_id"], block["block"], block["total_s_per_sample"]) == (case.id, 0, 0.25)
    assert "other processes" in block["disturbed_by"]


def test_records_alone_are_enough(tmp_path: Path) -> None:
    write_run(tmp_path)
    run = read_run(tmp_path)
    assert (run.environments, run.sweep, run.timelines) == ([], "", {})


def test_records_of_schema_1_give_a_page(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_bytes(SCHEMA_1.read_bytes())
    draw_run(tmp_path)
    assert "Hydra-PPO" in (tmp_path / "index.html").read_text()


def test_two_runs_are_compared(tmp_path: Path) -> None:
    for name, seconds in (("before", 0.5), ("after", 0.25)):
        write_run(tmp_path / name, seconds=seconds)
    sentences = write_run_page([tmp_path / "before", tmp_path / "after"], tmp_path / "comparison.html")
    assert sentences[0].startswith("Of 1 case that both have, after is faster than before in 0")
    assert "Against before" in (tmp_path / "comparison.html").read_text()


def test_runs_of_one_name_are_told_apart_by_their_folders() -> None:
    assert run_names([Path("/a/run"), Path("/b/run")]) == ["a/run", "b/run"]
    assert run_names([Path("/a/one"), Path("/b/two")]) == ["one", "two"]


def test_a_run_is_drawn_without_the_libraries_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path)
    found = importlib.util.find_spec
    absent = ("altair", "vl_convert")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    assert missing_libraries() == ["altair", "vl-convert-python"]
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(draw_run(tmp_path))
    assert "No page was written. It needs: pip install altair vl-convert-python" in console.export_text()
    assert not (tmp_path / "index.html").exists()
    assert (tmp_path / "latency.png").exists()


def test_a_sweep_that_is_not_text_is_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "sweep.toml").write_bytes(b"\xff")
    with pytest.raises(RecordsError, match=r"sweep.toml' cannot be read"):
        read_run(tmp_path)


def test_an_old_page_stays_when_a_new_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhfreports.page import render

    write_run(tmp_path)
    (tmp_path / "index.html").write_text("old")
    monkeypatch.setattr(render, "rendered", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_run_page([tmp_path], tmp_path / "index.html")
    assert (tmp_path / "index.html").read_text() == "old"
    assert not list(tmp_path.glob(".index*"))


def host_run(folder: Path, host: str, cpu: str) -> None:
    write_run(folder)
    (record,) = read_records(folder)
    record["run"] = {"id": host, "segment": 0, "host": host}
    (folder / "records.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "environment.json").write_text(json.dumps({"host": host, "cpu": {"model": cpu}}))


def test_hosts_of_two_runs_are_one_machine_where_the_user_says_so(tmp_path: Path) -> None:
    folders = [tmp_path / "before", tmp_path / "after"]
    for folder, host in zip(folders, ("c1", "c2"), strict=True):
        host_run(folder, host, "AMD EPYC")
    assert "two machines" in write_run_page(folders, tmp_path / "comparison.html")[0]
    note, counts, *_ = write_run_page(folders, tmp_path / "comparison.html", same_machine=True)
    assert note.startswith("The hosts c1 = c2 count as one machine because --same-machine says so")
    assert counts.startswith("Of 1 case that both have")
    assert note in (tmp_path / "comparison.html").read_text()


def test_cpus_of_two_models_are_no_one_machine(tmp_path: Path) -> None:
    folders = [tmp_path / "before", tmp_path / "after"]
    for folder, (host, cpu) in zip(folders, (("c1", "AMD EPYC"), ("c2", "Intel Xeon")), strict=True):
        host_run(folder, host, cpu)
    message = "--same-machine: the runs were made on AMD EPYC and Intel Xeon, which no machine has at once."
    with pytest.raises(SweepError, match=re.escape(message)):
        write_run_page(folders, tmp_path / "comparison.html", same_machine=True)


def test_a_run_that_was_resumed_under_another_name_is_of_one_machine_where_the_user_says_so(tmp_path: Path) -> None:
    host_run(tmp_path, "c1", "AMD EPYC")
    (record,) = read_records(tmp_path)
    other = {
        **record,
        "case": {**record["case"], "id": "other", "prompt_len": 16},
        "run": {**record["run"], "host": "c2"},
    }
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (record, other)))
    draw_run(tmp_path)
    assert "measured on 2 machines (c1, c2)" in (tmp_path / "memory_table.md").read_text()
    draw_run(tmp_path, same_machine=True)
    assert "The hosts c1 = c2 count as one machine" in (tmp_path / "memory_table.md").read_text()


def test_the_timeline_of_a_plan_is_read_beside_the_measured_one(tmp_path: Path) -> None:
    case = write_run(tmp_path)
    phase = {"names": ["score"], "first_event": 0, "last_event": 1}
    timeline = {"phases": [phase], "events": [1], "parts_bytes": {part: [0] for part in PARTS}}
    for name in (case.id, planned(case.id)):
        write_timeline(tmp_path / "timelines", name, timeline)
    run = read_run(tmp_path)
    assert list(run.timelines) == list(run.predicted_timelines) == [case.id]
