import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlhfbench.errors import ForkServerError, RecordsError
from rlhfbench.records.file import read_records
from rlhfbench.runs import runner

HERE = Path(__file__).parents[1]


SMALL = ("--methods", "hydra", "--seq-lens", "8", "--batch-sizes", "1")


def kind(name):
    return ("--option", f"data.prompt_field={name}")


@pytest.mark.usefixtures("fake")
def test_run_prints_the_table_and_the_folder(call, tmp_path):
    code, out, err = call("run", *SMALL, *kind("ok"), "--out", "here")
    assert (code, out) == (0, "table of here\n")
    assert err.splitlines()[-1] == "The run is in here."
    (record,) = read_records("here")
    assert record["outcome"] == "ok"
    environment = json.loads((tmp_path / "here" / "environment.json").read_text())
    assert environment["argv"] == ["rlhfbench", "run", *SMALL, *kind("ok"), "--out", "here"]


@pytest.mark.usefixtures("fake")
def test_every_flag_reaches_the_case_and_the_settings(call, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"q": "hello"}\n')
    code, out, _ = call(
        "run", "--model", "gpt2", "--methods", "lora", "--seq-lens", "10", "--batch-sizes", "4", "--prompts", "p.jsonl",
        "--prompt-field", "q", "--prompt-fraction", "0.2", "--device", "cpu", "--dtype", "bfloat16", "--lora-rank", "4",
        "--seed", "3",
        "--option", "ppo.gamma=0.5", "--option", "ppo.num_mini_batches=2", "--time-budget-s", "1.5",
        "--case-timeout-s", "9", "--memory-limit", "1GiB", "--threads", "1", "--profile", "--with-plan", "--json",
    )  # fmt: skip
    assert code == 3  # the fake has no behaviour called q
    (record,) = json.loads(out)
    case, options = record["case"], record["case"]["options"]
    assert (case["model"], case["method"], case["prompt_len"], case["completion_len"]) == ("gpt2", "lora", 2, 8)
    assert (case["batch_size"], case["dtype"], options["lora"]["r"], case["seed"]) == (4, "bfloat16", 4, 3)
    assert options["data"] == {
        "prompts": str(tmp_path / "p.jsonl"),
        "prompt_field": "q",
        "demonstrations": None,
        "pairs": None,
    }
    assert (options["ppo"]["gamma"], options["ppo"]["num_mini_batches"]) == (0.5, 2)
    (folder,) = tmp_path.glob("rlhfbench-run-*Z")
    settings = json.loads((folder / "environment.json").read_text())["settings"]
    assert settings["time_budget_s"] == 1.5
    assert settings["case_timeout_s"] == 9
    assert settings["memory_limit_bytes"] == 2**30
    assert settings["num_threads"] == 1
    assert settings["profile"] is True
    assert settings["with_plan"] is True
    assert record["plan"]["total_bytes"] == 7


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--device", "cuda"), "it runs on a CPU, so device must be 'cpu'."),
        (("--dtype", "bfloat16"), "it has no bfloat16, so dtype must be float32."),
        ((), "its C code cannot be compiled here (CC is '/nonexistent', not a command)."),
    ],
    ids=["on a GPU", "in bfloat16", "without a compiler"],
)
def test_a_backend_that_cannot_run_is_reported_before_any_case(call, monkeypatch, tmp_path, flags, sentence):
    monkeypatch.setenv("CC", "/nonexistent")
    code, out, err = call("run", *SMALL, *kind("ok"), *flags, "--option", "engine.backend=native", "--out", "here")
    assert (code, out, err) == (2, "", f"engine.backend is 'native': {sentence}\n")
    assert not (tmp_path / "here").exists()


@pytest.mark.usefixtures("fake")
def test_flags_win_over_a_sweep_file(call, tmp_path):
    (tmp_path / "s.toml").write_text(
        'methods = ["hydra", "lora"]\nseq_lens = [8]\nbatch_sizes = [1]\noptions.data.prompt_field = "ok"\n'
    )
    assert call("run", "--sweep", "s.toml", "--methods", "full", "--dtype", "bfloat16", "--out", "a")[0] == 0
    (record,) = read_records("a")
    assert (record["case"]["method"], record["case"]["dtype"]) == ("full", "bfloat16")


@pytest.mark.usefixtures("fake")
def test_a_run_without_an_ok_case_exits_with_3(call):
    code, out, err = call("run", *SMALL, *kind("segfault"), "--out", "here")
    assert code == 3
    assert out == "table of here\n"
    assert "Nothing could be measured: no case is ok." in err


@pytest.mark.usefixtures("fake")
def test_an_interrupt_prints_the_command_that_resumes(call, monkeypatch):
    def interrupted(*arguments, **keywords):
        keywords["progress"] = None
        return runner.RunResult(run_dir=Path("a folder"), records=[{}, {}], interrupted=True)

    monkeypatch.setattr(runner, "run_sweep", interrupted)
    code, out, err = call("run", *SMALL)
    assert (code, out) == (130, "")
    assert err.splitlines() == [
        "Interrupted: 2 cases are recorded in a folder.",
        "To resume: rlhfbench run --resume 'a folder'",
    ]


def test_a_full_disk_prints_the_command_that_resumes(call, monkeypatch):
    def full(*arguments, **keywords):
        error = OSError(errno.ENOSPC, "No space left on device")
        raise RecordsError(f"records file 'x' cannot be written: {error.strerror}.") from error

    monkeypatch.setattr(runner, "run_sweep", full)
    code, _, err = call("run", *SMALL, "--out=x")
    assert code == 2
    assert err.splitlines()[0] == "records file 'x' cannot be written: No space left on device."
    assert err.splitlines()[1].endswith("rlhfbench run --resume x")


def test_a_fork_server_that_does_not_start_exits_with_3(call, monkeypatch):
    def broken(*arguments, **keywords):
        raise ForkServerError("the fork server did not start: ImportError")

    monkeypatch.setattr(runner, "run_sweep", broken)
    assert call("run", *SMALL) == (3, "", "the fork server did not start: ImportError\n")


def test_ctrl_c_and_sigterm_leave_a_run_that_can_be_resumed(tmp_path):
    for number in (signal.SIGINT, signal.SIGTERM):
        out = tmp_path / number.name
        command = [sys.executable, HERE / "fake_case.py", "", "run", *SMALL, *kind("hang"), "--out", out]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as harness:
            assert any(line.startswith("hanging") for line in harness.stdout)
            harness.send_signal(number)
            _, err = harness.communicate(timeout=60)
        assert harness.returncode == 130
        assert "Traceback" not in err
        assert err.splitlines()[-1].startswith("To resume: rlhfbench run ")
        assert read_records(out) == []
