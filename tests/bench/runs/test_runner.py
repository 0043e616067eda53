import dataclasses
import io
import itertools
import json
import os
import platform
import shutil
import sys

import pytest

from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import ForkServerError, RecordsError, RunFolderError, SweepError
from rlhfbench.records.file import RecordsFile, read_records
from rlhfbench.records.timelines import read_timeline
from rlhfbench.runs import runner
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.progress import LineProgress
from rlhfbench.runs.runner import dominates, run_sweep
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options

CASE = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=2)


pytestmark = pytest.mark.usefixtures("fake_server")


class Watching(LineProgress):
    """Keeps the stages of the cases; raises KeyboardInterrupt at one."""

    def __init__(self, interrupt_at=None):
        super().__init__(io.StringIO())
        self.told = []
        self.interrupt_at = interrupt_at

    def doing(self, what):
        self.told.append(what)
        if self.interrupt_at is not None and what.startswith(self.interrupt_at):
            raise KeyboardInterrupt

    @property
    def text(self):
        return self._stream.getvalue()


def sweep_of(*kinds, **changes):
    """One fake case of each kind; the kind is its ``data.prompt_field``."""
    base = dataclasses.replace(CASE, **changes)
    return Sweep(
        cases=tuple(dataclasses.replace(base, options=Options.of({"data.prompt_field": kind})) for kind in kinds)
    )


def run(sweep, out, progress=None, *, resume=False, retry=(), **options):
    options = RunOptions(**options)
    return run_sweep(sweep, out, options, resume=resume, retry=retry, progress=progress or Watching())


def test_a_run_writes_a_record_per_case_and_its_folder(tmp_path):
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


def test_the_resident_memory_means_the_same_for_every_outcome(tmp_path):
    records = run(sweep_of("ok", "large", "large-then-fails", "large-then-dies"), tmp_path / "run").records
    assert [r["outcome"] for r in records] == ["ok", "ok", "oom", "crashed"]
    least, *peaks = (r["memory"]["views"]["host_peak_bytes"] for r in records)
    assert min(peaks) > least + 250 * 2**20
    assert peaks == pytest.approx([peaks[0]] * 3, rel=0.03)


def test_a_case_receives_its_options(tmp_path):
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


class WatchingBlocks(Watching):
    """Notes the cases in the order in which blocks of them are timed."""

    def __init__(self):
        super().__init__()
        self.rounds = []

    def begin_blocks(self, number, num_blocks, num_cases):
        super().begin_blocks(number, num_blocks, num_cases)
        self.rounds.append([])

    def start_block(self, case):
        super().start_block(case)
        self.rounds[-1].append(case.id)


def test_blocks_of_all_cases_alternate_in_random_order(tmp_path):
    cases = [dataclasses.replace(sweep_of("blocks").cases[0], batch_size=size) for size in range(1, 7)]
    watching = WatchingBlocks()
    result = run(Sweep(cases=tuple(cases)), tmp_path / "run", progress=watching, blocks=4)
    ids = [case.id for case in cases]
    assert [sorted(ids) == sorted(of_round) for of_round in watching.rounds] == [True] * 3
    assert len({tuple(ids), *map(tuple, watching.rounds)}) == 4
    for record in result.records:
        assert [block["phases"]["generate"] for block in record["latency"]["blocks"]] == [[1.0], [2.0], [3.0], [4.0]]
        size = record["case"]["batch_size"]
        assert record["latency"]["total_s_per_sample"] == pytest.approx(2.5 / size)
        assert record["latency"]["total_block_s_per_sample"] == pytest.approx([n / size for n in (1, 2, 3, 4)])
    assert read_records(tmp_path / "run") == result.records


def test_a_block_that_fails_is_recorded_and_does_not_count(tmp_path, capsys):
    (record,) = run(sweep_of("oom-in-block-1"), tmp_path / "run", blocks=3, progress=LineProgress(sys.stderr)).records
    assert record["outcome"] == "ok"
    assert record["latency"]["blocks"][1]["error"]["outcome"] == "oom"
    assert record["latency"]["total_block_s_per_sample"] == [0.5, None, 1.5]
    assert record["latency"]["total_s_per_sample"] == 1.0
    assert "block 2 of 3: oom: no room" in capsys.readouterr().err


def test_blocks_that_are_missing_are_timed_when_resumed(tmp_path):
    sweep = sweep_of("blocks", "ok")
    whole = run(sweep, tmp_path / "run", blocks=3).records
    path = tmp_path / "run" / "records.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    (cut, _) = read_records(tmp_path / "run")
    assert len(cut["latency"]["blocks"]) == 2
    assert run(sweep, tmp_path / "run", resume=True, blocks=3).records == whole


def test_blocks_of_two_machines_are_not_mixed(tmp_path, monkeypatch):
    sweep = sweep_of("blocks")
    run(sweep, tmp_path / "run", blocks=2)
    path = tmp_path / "run" / "records.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    monkeypatch.setattr(platform, "node", lambda: "another")
    (record,) = run(sweep, tmp_path / "run", resume=True, blocks=2).records
    assert len(record["latency"]["blocks"]) == 1


def test_every_record_has_a_plan_whatever_the_outcome(tmp_path):
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


def test_a_plan_that_fails_leaves_the_measurement_intact(tmp_path):
    result = run(sweep_of("plan-fails", "plan-dies"), tmp_path / "run", with_plan=True)
    assert [r["outcome"] for r in result.records] == ["ok", "ok"]
    assert [r["error"] for r in result.records] == [None, None]
    assert [r["memory"]["total_bytes"] for r in result.records] == [6, 6]
    failed, died = (r["plan"] for r in result.records)
    assert failed["error"] == {"kind": "ValueError", "message": "no fake of that", "phase": "plan"}
    assert died["error"]["kind"] == "SIGKILL"
    assert failed["total_bytes"] is died["total_bytes"] is None


def test_without_with_plan_nothing_is_predicted(tmp_path):
    (record,) = run(sweep_of("plan-dies"), tmp_path / "run").records
    assert record["plan"] is None


def test_a_timeline_is_kept_in_a_file_of_its_own(tmp_path):
    timed, plain = run(sweep_of("timeline", "ok"), tmp_path / "run").records
    folder = tmp_path / "run" / "timelines"
    assert [path.name for path in folder.iterdir()] == [f"{timed['case']['id']}.json"]
    assert read_timeline(folder, timed["case"]["id"])["parts_bytes"] == {"base": [6]}
    assert read_timeline(folder, plain["case"]["id"]) is None
    assert "timeline" not in timed


def test_every_way_to_die_is_an_outcome_and_the_run_continues(tmp_path):
    result = run(sweep_of("segfault", "exit", "die", "hang", "unknown", "ok"), tmp_path / "run", case_timeout_s=1.0)
    by_kind = {r["case"]["options"]["data"]["prompt_field"]: r for r in result.records}
    assert {kind: r["outcome"] for kind, r in by_kind.items()} == {
        "segfault": "crashed",
        "exit": "crashed",
        "die": "crashed",
        "hang": "timeout",
        "unknown": "crashed",
        "ok": "ok",
    }
    assert by_kind["segfault"]["error"]["kind"] == "SIGSEGV"
    assert by_kind["segfault"]["error"]["phase"] == "score"
    assert by_kind["exit"]["error"]["message"] == (
        "it exited with status 7 and left no result. Last line of its log: before the end"
    )
    assert by_kind["die"]["error"]["kind"] == "SIGKILL"
    assert by_kind["hang"]["error"]["message"] == "it was killed after 1 s."
    assert "KeyError: 'unknown'" in by_kind["unknown"]["error"]["message"]
    log = tmp_path / "run" / "logs" / f"{by_kind['unknown']['case']['id']}.log"
    assert "Traceback" in log.read_text()


def test_a_kill_by_the_kernel_for_memory_is_oom(tmp_path, monkeypatch):
    counter = itertools.count()
    monkeypatch.setattr(runner, "num_oom_kills", lambda: next(counter))
    result = run(sweep_of("die", "segfault"), tmp_path / "run")
    assert [r["outcome"] for r in result.records] == ["oom", "crashed"]
    assert "it: the machine was out of memory." in result.records[0]["error"]["message"]


def test_a_case_over_its_memory_limit_is_oom(tmp_path):
    result = run(sweep_of("over-limit", "ok"), tmp_path / "run", memory_limit_bytes=2**28)
    assert [r["outcome"] for r in result.records] == ["oom", "ok"]
    assert result.records[0]["error"]["kind"] == "MemoryError"


def test_a_server_that_dies_costs_one_case(tmp_path):
    class Killing(Watching):
        def doing(self, what):
            if what.startswith("hanging"):
                os.kill(int(what.split()[2]), 9)

    result = run(sweep_of("hang", "ok"), tmp_path / "run", Killing())
    assert [r["outcome"] for r in result.records] == ["crashed", "ok"]
    assert result.records[0]["error"]["kind"] == "ServerDied"


def test_cases_that_dominate_an_oom_case_are_skipped_and_name_it(tmp_path):
    spec = {
        "methods": ["hydra", "lora"],
        "models": "tiny",
        "seq_lens": [4, 8],
        "batch_sizes": [2, 4],
        "options": {"data.prompt_field": "oom-from-batch-4"},
    }
    result = run(Sweep.from_spec(spec), tmp_path / "run")
    outcomes = {(r["case"]["method"], r["case"]["batch_size"], r["case"]["prompt_len"]): r for r in result.records}
    assert {key: r["outcome"] for key, r in outcomes.items()} == {
        **{(method, 2, length): "ok" for method in ("hydra", "lora") for length in (2, 4)},
        **{(method, 4, 2): "oom" for method in ("hydra", "lora")},
        **{(method, 4, 4): "skipped" for method in ("hydra", "lora")},
    }
    failed, skipped = outcomes["hydra", 4, 2], outcomes["hydra", 4, 4]
    assert failed["case"]["id"] in skipped["error"]["message"]
    assert skipped["error"]["kind"] == "Dominates"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"prompt_len": 5}, True),
        ({"completion_len": 5, "batch_size": 3, "options": Options.of({"lora.r": 17})}, True),
        ({"seed": 1}, True),
        ({"prompt_len": 3}, False),
        ({"completion_len": 9, "batch_size": 1}, False),
        ({"options": Options.of({"lora.r": 8})}, False),
        ({"method": "lora"}, False),
        ({"model": "gpt2"}, False),
        ({"device": "cuda"}, False),
        ({"dtype": "bfloat16"}, False),
        ({"options": Options.of({"ppo.gamma": 0.5})}, False),
    ],
)
def test_dominates(change, expected):
    assert dominates(dataclasses.replace(CASE, **change), CASE) is expected


def test_ctrl_c_leaves_a_valid_run_that_is_resumed(tmp_path):
    sweep = sweep_of("ok", "hang", "chatter")
    progress = Watching(interrupt_at="hanging")
    result = run(sweep, tmp_path / "run", progress)
    assert result.interrupted
    assert [r["outcome"] for r in read_records(tmp_path / "run")] == ["ok"]
    progress = Watching()
    result = run(sweep, tmp_path / "run", progress, resume=True, case_timeout_s=0.5)
    assert [r["outcome"] for r in result.records] == ["ok", "timeout", "ok"]
    assert not result.interrupted
    assert "2 cases to run, 1 already recorded" in progress.text


def test_what_is_recorded_is_not_run_again(tmp_path):
    sweep = sweep_of("ok", "segfault")
    before = run(sweep, tmp_path / "run").records
    progress = Watching()
    after = run(sweep, tmp_path / "run", progress, resume=True)
    assert after.records == before
    assert (progress.told, progress.text) == ([], "")


def test_a_torn_last_line_is_run_again(tmp_path):
    sweep = sweep_of("ok", "chatter")
    run(sweep, tmp_path / "run")
    path = tmp_path / "run" / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    progress = Watching()
    result = run(sweep, tmp_path / "run", progress, resume=True)
    assert [r["outcome"] for r in result.records] == ["ok", "ok"]
    assert "1 case to run, 1 already recorded" in progress.text


def test_failed_cases_are_run_again_on_request_and_their_newest_record_wins(tmp_path):
    sweep = sweep_of("ok", "segfault", "exit", "hang")
    before = run(sweep, tmp_path / "run", case_timeout_s=0.5).records
    progress = Watching()
    result = run(sweep, tmp_path / "run", progress, resume=True, retry=["crashed"])
    assert "2 cases to run, 2 already recorded" in progress.text
    assert [r["outcome"] for r in result.records] == ["ok", "timeout", "crashed", "crashed"]
    assert [r["run"]["segment"] for r in result.records] == [0, 0, 1, 1]
    assert result.records[:2] == [before[0], before[3]]
    assert read_records(tmp_path / "run") == result.records
    assert len((tmp_path / "run" / "records.jsonl").read_text().splitlines()) == 6  # nothing is deleted


def test_a_case_out_of_memory_that_is_run_again_skips_no_other(tmp_path):
    small, large = (sweep_of("oom-from-batch-4", batch_size=size).cases[0] for size in (4, 8))
    sweep = Sweep(cases=(small, large))
    run(sweep, tmp_path / "run")
    again = run(sweep, tmp_path / "run", resume=True, retry=["oom"])
    assert {r["case"]["batch_size"]: (r["outcome"], r["run"]["segment"]) for r in again.records} == {
        4: ("oom", 1),
        8: ("skipped", 0),
    }


def test_a_record_names_its_run_segment_host_and_threads(tmp_path):
    sweep = sweep_of("ok", "segfault")
    first = run(Sweep(cases=sweep.cases), tmp_path / "run").records
    again = run(sweep, tmp_path / "run", resume=True, retry=["crashed"]).records
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [r["run"] for r in (*first, again[1])] == [
        {"id": environment["run_id"], "segment": segment, "host": platform.node()} for segment in (0, 0, 1)
    ]
    assert [r["num_threads"] for r in again] == [5, None]


def test_a_resumed_run_keeps_its_options_unless_they_are_given_again(tmp_path):
    options = RunOptions(time_budget_s=3.0, num_threads=2, memory_limit_bytes=2**40, with_plan=True, case_timeout_s=9)
    run_sweep(sweep_of("echo", "segfault"), tmp_path / "run", options, progress=Watching())
    result = run_sweep(
        sweep_of("echo", "segfault"), tmp_path / "run", resume=True, retry=["crashed"], progress=Watching()
    )
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["resumed"][0]["settings"] == environment["settings"]
    assert RunOptions.recorded(environment["settings"]) == options
    assert result.records[1]["plan"]["total_bytes"] == 7


@pytest.mark.parametrize("folder", [".", "absent"])
def test_without_a_run_to_resume_nothing_starts(tmp_path, folder):
    progress = Watching()
    with pytest.raises(RunFolderError, match="there is no run in it"):
        run(sweep_of("ok"), tmp_path / folder, progress, resume=True)
    assert (progress.text, list(tmp_path.iterdir())) == ("", [])


def test_a_resumed_run_says_what_changed(tmp_path, monkeypatch):
    sweep = sweep_of("ok", "chatter")
    run(sweep, tmp_path / "run")
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    progress = Watching()
    run(sweep, tmp_path / "run", progress, resume=True, num_threads=7)
    (line,) = progress.text.splitlines()
    assert "host elsewhere instead of " in line
    assert "threads 7 instead of " in line
    hosts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [hosts["resumed"][0]["host"], hosts["host"] != "elsewhere"] == ["elsewhere", True]


def test_a_resumed_run_skips_by_recorded_oom_cases(tmp_path):
    small, large = (sweep_of("oom-from-batch-4", batch_size=size).cases[0] for size in (4, 8))
    sweep = Sweep(cases=(small, large))
    run(sweep, tmp_path / "run")
    path = tmp_path / "run" / "records.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    assert [r["outcome"] for r in run(sweep, tmp_path / "run", resume=True).records] == ["oom", "skipped"]


def test_a_full_disk_ends_the_run_and_it_is_resumed(tmp_path, monkeypatch):
    sweep = sweep_of("ok", "chatter")
    whole = RecordsFile.append

    def full(self, record):
        if self.records:
            raise RecordsError("records file cannot be written: No space left on device.")
        whole(self, record)

    monkeypatch.setattr(RecordsFile, "append", full)
    with pytest.raises(RecordsError):
        run(sweep, tmp_path / "run")
    monkeypatch.setattr(RecordsFile, "append", whole)
    assert run(sweep, tmp_path / "run", resume=True).num_ok == 2


def test_nothing_is_written_where_the_sweep_cannot_be_run(tmp_path):
    with pytest.raises(SweepError, match="too long"):
        run(sweep_of("ok", prompt_len=5000), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use(tmp_path):
    sweep = sweep_of("ok")
    run(sweep, tmp_path / "run")
    with RecordsFile(tmp_path / "run"), pytest.raises(RunFolderError, match="in use"):
        run(sweep, tmp_path / "run", resume=True)


def test_every_wrong_run_option_is_reported():
    with pytest.raises(SweepError) as caught:
        RunOptions(time_budget_s=0, case_timeout_s=-1.0, num_threads=0, memory_limit_bytes=0)
    assert caught.value.problems == (
        "time_budget_s is 0: it must be a finite number above 0 and at most 1000000.",
        "num_threads is 0: it must be a whole number from 1 to 1024 or none.",
        "case_timeout_s is -1.0: it must be a finite number above 0 and at most 1000000.",
        "memory_limit_bytes is 0: it must be a whole number from 1 to 1152921504606846976 or none.",
    )


class FakeSampler:
    available = True

    def __init__(self, index):
        self.index = index

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.left = True

    def peak_bytes(self, pid):
        return 1000 + self.index if pid else None


def on_cuda(monkeypatch):
    import rlhfbench.measure.nvml
    from rlhfbench.cases import preflight

    monkeypatch.setattr(preflight, "_check_device", lambda device: iter(()))
    monkeypatch.setattr(rlhfbench.measure.nvml, "NvmlSampler", FakeSampler)


def test_the_peak_of_the_driver_is_sampled_from_outside_the_process(tmp_path, monkeypatch):
    on_cuda(monkeypatch)
    result = run(sweep_of("ok", device="cuda:1"), tmp_path / "run")
    assert result.records[0]["memory"]["views"]["driver_peak_bytes"] == 1001


def test_without_nvml_the_driver_peak_is_null_and_one_notice_says_so(tmp_path, monkeypatch):
    on_cuda(monkeypatch)
    monkeypatch.setattr(FakeSampler, "available", False)
    monkeypatch.setattr(FakeSampler, "peak_bytes", lambda self, pid: None)
    progress = Watching()
    result = run(sweep_of("ok", "chatter", device="cuda"), tmp_path / "run", progress)
    assert [r["memory"]["views"]["driver_peak_bytes"] for r in result.records] == [None, None]
    assert progress.text.count("NVML is not available") == 1


def test_a_system_that_cannot_fork_cases_is_one_sentence_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "fork")
    with pytest.raises(ForkServerError, match="on Windows"):
        run(sweep_of("ok"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_removed_in_mid_run_is_one_sentence(tmp_path):
    class Removing(Watching):
        def finish_case(self, case, record):
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(RunFolderError, match="cannot be used any more: No such file or directory"):
        run(sweep_of("ok", "chatter"), tmp_path / "run", Removing())


def test_a_folder_that_is_removed_during_the_last_case_is_one_sentence(tmp_path):
    class Removing(Watching):
        def doing(self, what):
            super().doing(what)
            if self.told.count("score") == 2:
                shutil.rmtree(tmp_path / "run")

    with pytest.raises(RunFolderError, match="cannot be used any more: No such file or directory"):
        run(sweep_of("ok", "chatter"), tmp_path / "run", Removing())


def test_records_that_are_removed_during_the_last_case_are_one_sentence(tmp_path):
    """The file stays open: without a check, records would go into a file that nobody can read."""

    class Removing(Watching):
        def doing(self, what):
            (tmp_path / "run" / "records.jsonl").unlink(missing_ok=True)

    with pytest.raises(RecordsError, match="cannot be written: it was removed"):
        run(sweep_of("ok"), tmp_path / "run", Removing())


def test_a_closed_stream_of_progress_ends_no_run(tmp_path):
    progress = Watching()
    progress._stream.close()
    assert run(sweep_of("ok", "chatter"), tmp_path / "run", progress).num_ok == 2


def test_a_file_system_without_locks_is_one_sentence(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(RunFolderError, match="cannot be locked or read: Operation not supported"):
        run(sweep_of("ok"), tmp_path / "run")


def test_oom_kills_are_counted():
    assert runner.num_oom_kills() >= 0


def test_warnings_come_before_the_first_case(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhfbench.cases.preflight.notices", lambda sweep: ["This is slow."])
    progress = Watching()
    run(sweep_of("ok"), tmp_path / "run", progress)
    assert progress.text.splitlines()[0] == "This is slow."
