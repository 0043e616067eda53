import json
import platform

import pytest

from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import RunFolderError
from rlhfbench.records.file import read_records
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.runner import run_sweep

pytestmark = pytest.mark.usefixtures("fake_server")


def test_ctrl_c_leaves_a_valid_run_that_is_resumed(tmp_path, sweep_of, run, watching):
    sweep = sweep_of("ok", "hang", "chatter")
    progress = watching(interrupt_at="hanging")
    result = run(sweep, tmp_path / "run", progress)
    assert result.interrupted
    assert [r["outcome"] for r in read_records(tmp_path / "run")] == ["ok"]
    progress = watching()
    result = run(sweep, tmp_path / "run", progress, resume=True, case_timeout_s=5)
    assert [r["outcome"] for r in result.records] == ["ok", "timeout", "ok"]
    assert not result.interrupted
    assert "2 cases to run, 1 already recorded" in progress.text


def test_what_is_recorded_is_not_run_again(tmp_path, sweep_of, run, watching):
    sweep = sweep_of("ok", "segfault")
    before = run(sweep, tmp_path / "run").records
    progress = watching()
    after = run(sweep, tmp_path / "run", progress, resume=True)
    assert after.records == before
    assert (progress.told, progress.text) == ([], "")


def test_a_torn_last_line_is_run_again(tmp_path, sweep_of, run, watching):
    sweep = sweep_of("ok", "chatter")
    run(sweep, tmp_path / "run")
    path = tmp_path / "run" / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    progress = watching()
    result = run(sweep, tmp_path / "run", progress, resume=True)
    assert [r["outcome"] for r in result.records] == ["ok", "ok"]
    assert "1 case to run, 1 already recorded" in progress.text


def test_failed_cases_are_run_again_on_request_and_their_newest_record_wins(tmp_path, sweep_of, run, watching):
    sweep = sweep_of("ok", "segfault", "exit", "hang")
    before = run(sweep, tmp_path / "run", case_timeout_s=5).records
    progress = watching()
    result = run(sweep, tmp_path / "run", progress, resume=True, retry=["crashed"])
    assert "2 cases to run, 2 already recorded" in progress.text
    assert [r["outcome"] for r in result.records] == ["ok", "timeout", "crashed", "crashed"]
    assert [r["run"]["segment"] for r in result.records] == [0, 0, 1, 1]
    assert result.records[:2] == [before[0], before[3]]
    assert read_records(tmp_path / "run") == result.records
    assert len((tmp_path / "run" / "records.jsonl").read_text().splitlines()) == 6  # nothing is deleted


def test_the_log_of_a_case_that_is_run_again_is_that_of_the_last_time(tmp_path, sweep_of, run):
    """Else the last line of an earlier try would stand in the message of a death that said nothing."""
    sweep = sweep_of("segfault")
    (before,) = run(sweep, tmp_path / "run").records
    path = tmp_path / "run" / "logs" / f"{before['case']['id']}.log"
    said = path.read_text()
    path.write_text("of an earlier try\n" + said)
    run(sweep, tmp_path / "run", resume=True, retry=["crashed"])
    assert "of an earlier try" not in path.read_text()
    assert "Segmentation fault" in path.read_text()


def test_cases_that_were_skipped_for_a_case_out_of_memory_are_run_again_with_it(tmp_path, sweep_of, run):
    small, large = (sweep_of("oom-from-batch-4", batch_size=size).cases[0] for size in (4, 8))
    sweep = Sweep(cases=(small, large))
    run(sweep, tmp_path / "run")
    again = run(sweep, tmp_path / "run", resume=True, retry=["oom"])
    assert {r["case"]["batch_size"]: (r["outcome"], r["run"]["segment"]) for r in again.records} == {
        4: ("oom", 1),
        8: ("skipped", 1),
    }


def test_a_case_out_of_memory_under_another_limit_skips_no_other(tmp_path, sweep_of, run):
    small, large = (sweep_of("over-limit", batch_size=size).cases[0] for size in (1, 2))
    sweep = Sweep(cases=(small, large))
    run(sweep, tmp_path / "run", memory_limit_bytes=2**28)
    path = tmp_path / "run" / "records.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    records = run(sweep, tmp_path / "run", resume=True, memory_limit_bytes=2**29).records
    assert [record["outcome"] for record in records] == ["oom", "oom"]


def test_a_case_out_of_memory_with_other_code_skips_no_other(tmp_path, monkeypatch, sweep_of, run):
    small, large = (sweep_of("oom-from-batch-4", batch_size=size).cases[0] for size in (4, 8))
    sweep = Sweep(cases=(small, large))
    run(sweep, tmp_path / "run")
    path = tmp_path / "run" / "records.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    monkeypatch.setattr("rlhfbench.runs.versions.installed", lambda: ("1.0", "edited"))
    assert [r["outcome"] for r in run(sweep, tmp_path / "run", resume=True).records] == ["oom", "oom"]


def test_options_that_do_not_reach_recorded_cases_are_told(tmp_path, sweep_of, run, watching):
    sweep = sweep_of("ok", "segfault")
    run(sweep, tmp_path / "run", profile=True)
    progress = watching()
    result = run(sweep, tmp_path / "run", progress, resume=True, profile=True, with_plan=True, retry=["crashed"])
    assert progress.text.splitlines()[0] == (
        "--with-plan holds for cases that are run from now on: 1 already measured stays as recorded."
    )
    assert [record["plan"] is None for record in result.records] == [True, False]


def test_a_record_names_its_run_segment_host_and_threads(tmp_path, sweep_of, run):
    sweep = sweep_of("ok", "segfault")
    first = run(Sweep(cases=sweep.cases), tmp_path / "run").records
    again = run(sweep, tmp_path / "run", resume=True, retry=["crashed"]).records
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [r["run"] for r in (*first, again[1])] == [
        {"id": environment["run_id"], "segment": segment, "host": platform.node()} for segment in (0, 0, 1)
    ]
    assert [r["num_threads"] for r in again] == [5, None]


def test_a_resumed_run_keeps_its_options_unless_they_are_given_again(tmp_path, sweep_of, watching):
    options = RunOptions(time_budget_s=3.0, num_threads=2, memory_limit_bytes=2**40, with_plan=True, case_timeout_s=9)
    run_sweep(sweep_of("echo", "segfault"), tmp_path / "run", options, progress=watching())
    result = run_sweep(
        sweep_of("echo", "segfault"), tmp_path / "run", resume=True, retry=["crashed"], progress=watching()
    )
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["resumed"][0]["settings"] == environment["settings"]
    assert RunOptions.recorded(environment["settings"]) == options
    assert result.records[1]["plan"]["total_bytes"] == 7


@pytest.mark.parametrize("folder", [".", "absent"])
def test_without_a_run_to_resume_nothing_starts(tmp_path, folder, sweep_of, run, watching):
    progress = watching()
    with pytest.raises(RunFolderError, match="there is no run in it"):
        run(sweep_of("ok"), tmp_path / folder, progress, resume=True)
    assert (progress.text, list(tmp_path.iterdir())) == ("", [])


def test_a_resumed_run_says_what_changed(tmp_path, monkeypatch, sweep_of, run, watching):
    sweep = sweep_of("ok", "chatter")
    run(sweep, tmp_path / "run")
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    progress = watching()
    run(sweep, tmp_path / "run", progress, resume=True, num_threads=7)
    (line,) = progress.text.splitlines()
    assert "host elsewhere instead of " in line
    assert "threads 7 instead of " in line
    hosts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [hosts["resumed"][0]["host"], hosts["host"] != "elsewhere"] == ["elsewhere", True]


def test_a_resumed_run_skips_by_recorded_oom_cases(tmp_path, sweep_of, run):
    small, large = (sweep_of("oom-from-batch-4", batch_size=size).cases[0] for size in (4, 8))
    sweep = Sweep(cases=(small, large))
    run(sweep, tmp_path / "run")
    path = tmp_path / "run" / "records.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    assert [r["outcome"] for r in run(sweep, tmp_path / "run", resume=True).records] == ["oom", "skipped"]
