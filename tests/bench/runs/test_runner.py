import dataclasses
import json
import os
from types import SimpleNamespace

import pytest

from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import ForkServerError, SweepError
from rlhfbench.records.file import read_records
from rlhfbench.records.timelines import read_timeline
from rlhfbench.runs.case_runner import Runner
from rlhfbench.runs.execution import Ended, Task
from rlhfbench.runs.folder import RunFolder
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.runner import run_sweep
from rlhfkernels.config.case import Case

pytestmark = pytest.mark.usefixtures("fake_server")


def test_a_run_writes_a_record_per_case_and_its_folder(tmp_path, sweep_of, run):
    sweep = sweep_of("ok", "chatter")
    result = run(sweep, tmp_path / "run", num_threads=3)
    assert [r["case"]["id"] for r in result.records] == [case.id for case in sweep.cases]
    assert (result.num_ok, result.interrupted) == (2, False)
    assert read_records(tmp_path / "run") == result.records
    record = result.records[0]
    assert record["memory"]["total_bytes"] == 6
    assert record["memory"]["views"]["host_peak_bytes"] > 2**20
    assert record["memory"]["views"]["driver_peak_bytes"] is None
    assert record["wall_s"] > 0
    assert "ceilings" not in record
    assert Sweep.from_file(tmp_path / "run" / "sweep.toml") == sweep
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["settings"]["num_threads"] == 3
    # A log that says nothing is not kept.
    assert [path.name for path in (tmp_path / "run" / "logs").iterdir()] == [f"{sweep.cases[1].id}.log"]


def test_the_resident_memory_means_the_same_for_every_outcome(tmp_path, sweep_of, run):
    records = run(sweep_of("ok", "large", "large-then-fails", "large-then-dies"), tmp_path / "run").records
    assert [r["outcome"] for r in records] == ["ok", "ok", "oom", "crashed"]
    least, *peaks = (r["memory"]["views"]["host_peak_bytes"] for r in records)
    assert min(peaks) > least + 250 * 2**20
    assert peaks == pytest.approx([peaks[0]] * 3, rel=0.03)


def test_a_case_receives_its_options(tmp_path, sweep_of, run):
    result = run(sweep_of("echo", "ok", "echo2"), tmp_path / "a")  # echo2 is no behaviour: it crashes
    assert [r["outcome"] for r in result.records] == ["ok", "ok", "crashed"]
    cases = sweep_of("ok", "echo")
    result = run(cases, tmp_path / "b", profile=True, time_budget_s=3.0, memory_limit_bytes=5, blocks=7)
    asked = result.records[1]["prompts"]
    assert asked["memory_limit_bytes"] == 5
    assert asked["case"] == {**cases.cases[1].to_dict(), "options": {"data": {"prompt_field": "echo"}}}
    assert Case.from_dict(asked["case"]) == cases.cases[1]
    assert asked["settings"] == {
        "time_budget_s": 3.0,
        "precision": RunOptions().precision,
        "num_threads": None,
        "profile_dir": str(tmp_path / "b" / "traces" / cases.cases[1].id),
        "timeline": True,
        "block": 0,
        "num_blocks": 7,
    }


def test_every_record_has_a_plan_whatever_the_outcome(tmp_path, sweep_of, run):
    sweep = sweep_of("ok", "segfault", "oom-from-batch-4", batch_size=4)
    larger = dataclasses.replace(sweep.cases[-1], batch_size=8)
    result = run(Sweep(cases=(*sweep.cases, larger)), tmp_path / "run", with_plan=True)
    assert [r["outcome"] for r in result.records] == ["ok", "crashed", "oom", "skipped"]
    for record in result.records:
        assert record["plan"] == {
            "model_bytes": 3,
            "activation_bytes": 2,
            "rollout_bytes": 1,
            "total_bytes": 7,
            "persistent_model_bytes": None,
            "peak_phase": "score",
            "parts": {},
            "phases": {},
            "error": None,
        }
    assert result.records[0]["memory"]["total_bytes"] == 6


def test_a_plan_that_fails_leaves_the_measurement_intact(tmp_path, sweep_of, run):
    result = run(sweep_of("plan-fails", "plan-dies"), tmp_path / "run", with_plan=True)
    assert [r["outcome"] for r in result.records] == ["ok", "ok"]
    assert [r["error"] for r in result.records] == [None, None]
    assert [r["memory"]["total_bytes"] for r in result.records] == [6, 6]
    failed, died = (r["plan"] for r in result.records)
    assert failed["error"] == {"kind": "ValueError", "message": "no fake of that", "phase": "plan"}
    assert died["error"]["kind"] == "SIGKILL"
    assert failed["total_bytes"] is died["total_bytes"] is None


def test_without_with_plan_nothing_is_predicted(tmp_path, sweep_of, run):
    (record,) = run(sweep_of("plan-dies"), tmp_path / "run").records
    assert record["plan"] is None


def test_a_timeline_is_kept_in_a_file_of_its_own(tmp_path, sweep_of, run):
    timed, plain = run(sweep_of("timeline", "ok"), tmp_path / "run").records
    folder = tmp_path / "run" / "timelines"
    assert [path.name for path in folder.iterdir()] == [f"{timed['case']['id']}.json"]
    assert read_timeline(folder, timed["case"]["id"])["parts_bytes"] == {"base": [6]}
    assert read_timeline(folder, plain["case"]["id"]) is None
    assert "timeline" not in timed


def test_every_wrong_run_option_is_reported():
    with pytest.raises(SweepError) as caught:
        RunOptions(time_budget_s=0, case_timeout_s=-1.0, num_threads=0, memory_limit_bytes=0)
    assert caught.value.problems == (
        "time_budget_s is 0: it must be a finite number above 0 and at most 1000000.",
        "num_threads is 0: it must be an integer from 1 to 1024 or none.",
        "case_timeout_s is -1.0: it must be a finite number above 0 and at most 1000000.",
        "memory_limit_bytes is 0: it must be an integer from 1 to 1152921504606846976 or none.",
    )


class FakeSampler:
    available = True

    def __init__(self, index):
        self.index, self.num_restarts = index, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.left = True

    def restart(self):
        self.num_restarts += 1

    def peak_bytes(self, pid):
        return 1000 * self.num_restarts + self.index if pid else None


def on_cuda(monkeypatch):
    import rlhfbench.measure.nvml
    from rlhfbench.cases import preflight

    monkeypatch.setattr(preflight, "_check_device", lambda device: iter(()))
    monkeypatch.setattr(rlhfbench.measure.nvml, "NvmlSampler", FakeSampler)


def test_the_peak_of_the_driver_is_sampled_from_outside_from_the_build_on(tmp_path, monkeypatch, sweep_of, run):
    on_cuda(monkeypatch)
    result = run(sweep_of("ok", device="cuda:1"), tmp_path / "run")
    assert result.records[0]["memory"]["views"]["driver_peak_bytes"] == 1001


@pytest.mark.parametrize(("world", "expected"), [(None, 7), ({"worst_rank": 0}, 7), ({"worst_rank": 1}, None)])
def test_the_peak_of_the_driver_is_of_the_worst_rank_or_of_none(tmp_path, world, expected, sweep_of):
    (case,) = sweep_of("ok").cases
    runner = Runner(RunFolder(tmp_path), RunOptions(), SimpleNamespace(entries={}), None, None)
    result = {"outcome": "ok", "error": None, "memory": {"views": {}}, "world": world}
    task = Task(case=case, request={}, log_path=tmp_path / "log", timeout_s=None)
    ended = Ended(task=task, result=result, started_at="now", wall_s=1.0, driver_peak_bytes=7)
    assert runner._record(ended)["memory"]["views"]["driver_peak_bytes"] == expected


def test_without_nvml_the_driver_peak_is_null_and_one_notice_says_so(tmp_path, monkeypatch, sweep_of, run, watching):
    on_cuda(monkeypatch)
    monkeypatch.setattr(FakeSampler, "available", False)
    monkeypatch.setattr(FakeSampler, "peak_bytes", lambda self, pid: None)
    progress = watching()
    result = run(sweep_of("ok", "chatter", device="cuda"), tmp_path / "run", progress)
    assert [r["memory"]["views"]["driver_peak_bytes"] for r in result.records] == [None, None]
    assert progress.text.count("NVML is not available") == 1


def test_a_system_that_cannot_fork_cases_is_one_sentence_and_writes_nothing(tmp_path, monkeypatch, sweep_of, run):
    monkeypatch.delattr(os, "fork")
    with pytest.raises(ForkServerError, match="on Windows"):
        run(sweep_of("ok"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_warnings_come_before_the_first_case(tmp_path, monkeypatch, sweep_of, run, watching):
    monkeypatch.setattr("rlhfbench.cases.preflight.notices", lambda sweep: ["This is slow."])
    progress = watching()
    run(sweep_of("ok"), tmp_path / "run", progress)
    assert progress.text.splitlines()[0] == "This is slow."


@pytest.mark.parametrize("retry", ["crash", ["oom", "crash"]])
def test_an_unknown_outcome_to_retry_is_one_sentence(tmp_path, sweep_of, retry):
    with pytest.raises(SweepError, match=r"^retry 'crash' is unknown"):
        run_sweep(sweep_of("ok"), tmp_path / "run", resume=True, retry=retry)


def test_one_outcome_to_retry_needs_no_list(tmp_path, sweep_of, run):
    run(sweep_of("exit"), tmp_path / "run")
    run(sweep_of("exit"), tmp_path / "run", resume=True, retry="crashed")
    assert [record["run"]["segment"] for record in read_records(tmp_path / "run")] == [1]


def test_a_sweep_without_cases_is_refused(tmp_path):
    with pytest.raises(SweepError, match=r"^the sweep has no cases: it must have at least one\.$"):
        run_sweep(Sweep(cases=()), tmp_path / "run")
    assert not (tmp_path / "run").exists()
