import dataclasses
import inspect
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import rlhfbench
import rlhfbench.gate.baseline
import rlhfbench.runs.drawing
from rlhfbench.cases.sizes import parse_size
from rlhfbench.cases.sweep import DEFAULT_GRID
from rlhfbench.cli import common
from rlhfbench.cli import gate as gate_verb
from rlhfbench.cli import main as cli
from rlhfbench.errors import ForkServerError, RecordsError, SweepError
from rlhfbench.records.file import read_records
from rlhfbench.records.frame import records_frame
from rlhfbench.runs import runner
from rlhfbench.runs.max_batch import find_max_batches
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.runner import RunResult
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options
from rlhfkernels.config.settings import SETTINGS
from rlhfkernels.methods.table import METHODS
from rlhfkernels.models.presets import PRESETS
from rlhfreports.terminal import Column, terminal

HERE = Path(__file__).parents[1]
SMALL = ("--methods", "hydra", "--seq-lens", "8", "--batch-sizes", "1")


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path, fake_case_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fake(monkeypatch, fake_server):
    """Has ``run`` run fake cases and draw a table of one line."""
    monkeypatch.setattr(rlhfbench.runs.drawing, "draw_run", lambda run_dir, **_: f"table of {run_dir}")


@pytest.fixture
def call(capsys, monkeypatch):
    """Calls the command; returns (exit code, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlhfbench", *arguments])
        code = cli.invoke(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


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
        ((), "its C code cannot be compiled here (CC is '/nonexistent', which is no command)."),
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
def test_cases_of_two_settings_are_interleaved_and_resumed(call, tmp_path):
    arguments = ("run", *SMALL, *kind("ok"), "--setting", "paper,modern", "--lora-rank", "4", "--out", "a")
    assert call(*arguments)[0] == 0
    records = read_records("a")
    assert records_frame(records)[["setting", "dtype", "lora_rank"]].to_numpy().tolist() == [
        ["paper", "bfloat16", 4],
        ["modern", "float32", 4],
    ]
    assert call("run", "--resume", "a")[0] == 0
    assert call(*arguments[:-2], "--resume", "a")[0] == 0
    assert read_records("a") == records
    # A sweep file can name them too, and a flag beside it wins.
    (tmp_path / "s.toml").write_text('settings = ["paper", "modern"]\n[options.lora]\nr = 2\n')
    assert call("run", "--sweep", "s.toml", *SMALL, *kind("ok"), "--out", "b")[0] == 0
    assert records_frame(read_records("b"))["setting"].tolist() == ["paper", "modern"]
    assert call("run", "--sweep", "s.toml", "--setting", "paper", *SMALL, *kind("ok"), "--out", "c")[0] == 0
    (record,) = read_records("c")
    assert (records_frame([record]).loc[0, "setting"], record["case"]["options"]["lora"]["r"]) == ("paper", 128)


@pytest.mark.usefixtures("fake")
def test_a_run_without_an_ok_case_exits_with_3(call):
    code, out, err = call("run", *SMALL, *kind("segfault"), "--out", "here")
    assert code == 3
    assert out == "table of here\n"
    assert "Nothing could be measured: no case is ok." in err


@pytest.mark.usefixtures("fake")
def test_a_run_is_resumed_by_the_same_command_or_by_its_folder_alone(call):
    arguments = ("run", *SMALL, *kind("ok"))
    assert call(*arguments, "--out", "here")[0] == 0
    assert call(*arguments, "--resume", "here")[0] == 0
    assert call("run", "--resume", "here")[0] == 0
    assert len(read_records("here")) == 1
    code, _, err = call(*arguments, "--lora-rank", "2", "--resume", "here")
    assert (code, err) == (2, "out 'here' holds a run of a different sweep: lora.r 2 instead of 16.\n")


@pytest.mark.usefixtures("fake")
def test_a_resumed_run_takes_its_settings_from_the_folder_unless_they_are_given_again(call):
    flags = ("--time-budget-s", "1.5", "--case-timeout-s", "9", "--memory-limit", "1GiB", "--threads", "1")
    call("run", *SMALL, *kind("exit"), *flags, "--profile", "--with-plan", "--out", "here")
    assert call("run", "--resume", "here", "--retry", "crashed")[0] == 3
    given = ("--threads", "2", "--no-profile", "--time-budget-s", "1")
    code, _, err = call("run", "--resume", "here", *given)
    assert (code, "threads 2 instead of 1" in err) == (3, True)
    environment = json.loads(Path("here/environment.json").read_text())
    first, second, third = (e["settings"] for e in (environment, *environment["resumed"]))
    assert (first["memory_limit_bytes"], first["profile"], first["with_plan"]) == (2**30, True, True)
    assert second == first
    assert third == {**first, "num_threads": 2, "profile": False, "time_budget_s": 1.0}
    assert [r["run"]["segment"] for r in read_records("here")] == [1]


@pytest.mark.usefixtures("fake")
def test_a_resumed_search_for_the_largest_batch_goes_on_searching(call):
    arguments = ("run", *SMALL, *kind("oom-from-batch-4"), "--max-batch", "--max-batch-limit", "3", "--json")
    first = call(*arguments, "--out", "here")
    assert json.loads(first[1])[0]["largest_ok"] == 3
    assert call("run", "--resume", "here", "--json")[1] == first[1]
    grown = json.loads(call("run", "--resume", "here", "--json", "--max-batch-limit", "8")[1])
    assert (grown[0]["largest_ok"], grown[0]["smallest_failing"]) == (3, 4)


@pytest.mark.usefixtures("fake")
def test_a_run_with_data_and_a_local_model_is_resumed_from_any_folder(call, tmp_path, monkeypatch, checkpoint):
    (tmp_path / "p.jsonl").write_text('{"ok": "hello"}\n')
    (tmp_path / "m").symlink_to(checkpoint("llama"))
    flags = ("--model", "./m", "--prompts", "p.jsonl", "--prompt-field", "ok")
    assert call("run", *SMALL, *flags, "--out", "here")[0] == 0
    (record,) = read_records("here")
    assert record["case"]["model"] == str(tmp_path / "m")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, err = call("run", "--resume", "../here")
    assert (code, err) == (0, "The run is in ../here.\n")
    assert read_records("../here") == [record]
    # Another content is another case.
    (tmp_path / "p.jsonl").write_text('{"ok": "good bye"}\n')
    code, _, err = call("run", "--resume", "../here")
    file = tmp_path / "p.jsonl"
    assert (code, err) == (2, f"data file '{file}' has changed since the run started: name a new folder.\n")


def test_a_recorded_setting_that_breaks_its_rule_is_one_sentence(call, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "sweep.toml").write_text("seq_lens = [8]\n")
    (tmp_path / "here" / "environment.json").write_text('{"settings": {"num_threads": "many", "later": 1}}')
    code, _, err = call("run", "--resume", "here")
    assert (code, err) == (2, "num_threads is 'many': it must be a whole number from 1 to 1024 or none.\n")


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
        raise RecordsError("records file 'x' cannot be written: No space left on device.")

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


WRONG = [
    (("run", "--methods", "hydr"), "method 'hydr' is unknown: did you mean 'hydra'"),
    (("run", "--methods", "hydra,,lora"), "methods has '': it must be a name."),
    (("run", "--model", "tinny"), "model 'tinny' is unknown: did you mean 'tiny'?"),
    (("run", "--model", "./absent"), "model './absent' does not exist: there is no such folder or file."),
    (("run", "--model", "."), "model '.' is a folder that holds no model: it has no config.json."),
    (("run", "--device", "gpu"), "device 'gpu' is unknown"),
    (("run", "--dtype", "float23"), "dtype 'float23' is unknown: did you mean 'float32' or"),
    (("run", "--seq-lens", "0"), "seq_lens has 0: it must be a whole number of at least 2."),
    (("run", "--seq-lens", "-8"), "seq_lens has -8: it must be a whole number of at least 2."),
    (("run", "--seq-lens", "8,x"), "--seq-lens has 'x': it must be whole numbers, joined by commas."),
    (("run", "--batch-sizes", ""), "--batch-sizes has '': it must be whole numbers, joined by commas."),
    (("run", "--batch-sizes", "0"), "batch_sizes has 0: it must be a whole number of at least 1."),
    (
        ("run", "--seq-lens", "9999"),
        "a length of 9999 (4999 + 5000) is too long for model 'tiny': it has 4096 positions.",
    ),
    (("run", "--lora-rank", "0"), "lora.r is 0: it must be a whole number from 1 to 2147483647."),
    (("run", "--lora-rank", "x"), "--lora-rank is 'x': it must be a whole number."),
    (("run", "--time-budget-s", "x"), "--time-budget-s is 'x': it must be a number."),
    (
        ("run", "--time-budget-s", "nan"),
        "time_budget_s is nan: it must be a finite number above 0 and at most 1000000.",
    ),
    (("run", "--seed", "-1"), "seed is -1: it must be a whole number of at least 0 and below 9223372036854775808."),
    (("run", "--prompt-fraction", "2"), "prompt_fraction is 2.0: it must be a number between 0 and 1."),
    (("run", "--prompts", "absent.jsonl"), "prompts 'absent.jsonl' cannot be read: No such file or directory."),
    (("run", "--prompts", "bad.jsonl"), "prompts 'bad.jsonl', line 2: it is not JSON."),
    (("run", "--prompts", "empty.jsonl"), "prompts 'empty.jsonl' is empty"),
    (
        ("run", "--prompts", "good.jsonl", "--prompt-field", "q"),
        "line 1: there is no field 'q'; its fields are 'prompt'.",
    ),
    (("run", "--option", "ppo.gama=1"), "option 'ppo.gama' is unknown: did you mean 'ppo.gamma'"),
    (("run", "--option", "ppo.gamma"), "option 'ppo.gamma' has no value: write it as KEY=VALUE."),
    (("run", "--option", "ppo.gamma=2"), "ppo.gamma is 2.0: it must be a finite number from 0 to 1."),
    (("run", "--option", "gamma=1"), "option 'gamma' is now called 'ppo.gamma'."),
    (("run", "--sweep", "absent.toml"), "sweep file 'absent.toml' cannot be read: No such file or directory."),
    (("run", "--sweep", "typo.toml"), "sweep key 'metods' is unknown: did you mean 'methods'"),
    (("run", "--time-budget-s", "0"), "time_budget_s is 0.0: it must be a finite number above 0 and at most 1000000."),
    (("run", "--memory-limit", "much"), "--memory-limit is 'much': it must be a size like 4GiB"),
    (("run", "--resume"), "Option '--resume' requires an argument."),
    (("run", "--resume", "absent"), "resume 'absent': there is no run in it, so there is nothing to resume."),
    (("run", "--resume", "full"), "resume 'full': there is no run in it"),
    (("run", "--resume", "old", "--out", "old"), "--out is 'old': it must be left out, since --resume names"),
    (("run", "--retry", "crashed"), "--retry is 'crashed': it needs --resume DIR."),
    (("run", "--resume", "old", "--retry", "crash"), "--retry 'crash' is unknown: did you mean 'crashed'?"),
    (("run", "--resume", "old", "--retry", "ok"), "--retry 'ok' is unknown"),
    (("run", "--threads", "100000"), "num_threads is 100000: it must be a whole number from 1 to 1024"),
    (("run", "--case-timeout-s", "inf"), "case_timeout_s is inf: it must be a finite number above 0 and at most"),
    (("run", "--out", "full"), "out 'full' holds files of something else: name an empty or a new folder."),
    (("run", "--out", "good.jsonl/x"), "out 'good.jsonl/x' cannot be written: Not a directory."),
    (("run", "--out", "old"), "out 'old' holds another run: continue it with --resume, or name a new folder."),
    (("run", "--sed", "1"), "No such option: --sed"),
    (("rum",), "No such command 'rum'"),
    (("report", "absent"), "records file 'absent' cannot be read: No such file or directory."),
    (("report", "future"), "its schema is 99 and this rlhfbench reads up to 2: a newer one wrote it."),
    (("report", "old"), "run 'old' holds no records yet: there is nothing to draw."),
    (("report",), "Missing argument 'RUN [RUN…]'."),
    (("report", "old", "--out", "x"), "--out is 'x': it needs two runs or more; the report of one run stands in its"),
    (("report", "old", "./old"), "RUN names one folder twice: compare a run with another one."),
    (("report", "old", "future"), "run 'old' holds no records yet: there is nothing to draw."),
]


@pytest.mark.parametrize(
    ("arguments", "says"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_a_mistake_is_one_clear_sentence_and_exit_code_2(call, tmp_path, arguments, says):
    (tmp_path / "good.jsonl").write_text('{"prompt": "hello"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "hello"}\n{\n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "typo.toml").write_text('metods = ["hydra"]\n')
    for folder, name, text in (
        ("full", "thesis.tex", ""),
        ("future", "records.jsonl", '{"schema": 99}\n'),
        ("old", "records.jsonl", ""),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1
    assert err.endswith((".\n", "?\n"))
    assert sorted(tmp_path.rglob("*")) == before


def test_cuda_without_a_cuda_device(call, monkeypatch):
    from rlhfbench.cases import preflight

    monkeypatch.setattr(preflight, "num_cuda_devices", lambda: 0)
    assert call("run", "--device", "cuda") == (2, "", "device 'cuda': this machine has no CUDA device.\n")


def test_a_system_without_fork_says_so_before_anything_is_imported_or_written(tmp_path):
    code = (
        "import os, sys, psutil\ndel os.fork\nsys.modules['resource'] = sys.modules['fcntl'] = None\n"
        "from rlhfbench.cli import main as cli\nsys.exit(cli.invoke(['run', '--out', 'here']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1)
    assert "run needs os.fork, which this system lacks" in done.stderr
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("closing", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closing):
    code = "import sys; from rlhfbench.cli import main; sys.argv[1:] = ['methods']; main.main()"
    command = f'"{sys.executable}" -c "{code}" {closing}'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


WITH_FAKE_CASES = (
    "import fake_case; from rlhfbench.runs import runner; runner.make_server = fake_case.make_server; "
    "from rlhfbench.cli import main; main.main()"
)


@pytest.mark.parametrize("more", [(), ("--json",)])
@pytest.mark.parametrize(("behaviour", "code"), [("ok", 0), ("exit", 3)])
def test_a_pipe_that_closes_in_mid_run_loses_nothing(tmp_path, behaviour, code, more):
    """As in ``rlhfbench run 2>&1 | head -1``: the reader has left before the first case ends."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-c", WITH_FAKE_CASES, "run", *SMALL, *kind(behaviour), "--out", "here", *more]
    try:
        done = subprocess.run(command, stdout=write_end, stderr=write_end, check=False)
    finally:
        os.close(write_end)
    assert done.returncode == code
    assert [record["outcome"] for record in read_records("here")] == ["ok" if code == 0 else "crashed"]
    assert (tmp_path / "here" / "memory_table.md").is_file()


def test_a_verb_whose_reader_has_left_ends_as_if_it_had_stayed():
    code = "import sys; from rlhfbench.cli import main; sys.argv[1:] = ['methods']; main.main()"
    command = f'"{sys.executable}" -c "{code}" | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


WINDOWS = (
    "import os, sys, multiprocessing, psutil\n"
    "del os.fork\n"
    "sys.modules['resource'] = sys.modules['fcntl'] = None\n"
    "multiprocessing.get_all_start_methods = lambda: ['spawn']\n"
    "get_context = multiprocessing.get_context\n"
    "multiprocessing.get_context = lambda method=None: get_context({None: None, 'spawn': 'spawn'}[method])\n"
)


def test_plan_runs_on_a_system_like_windows():
    """One process plans everything there: no fork server can be had."""
    flags = ["--methods", "hydra,lora", "--seq-lens", "8", "--batch-sizes", "1", "--json"]
    code = f"{WINDOWS}from rlhfbench.cli import main as cli\nsys.exit(cli.invoke(['plan', *{flags}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [plan["case"]["method"] for plan in json.loads(done.stdout)] == ["hydra", "lora"]


def test_running_in_python_on_a_system_like_windows_is_one_sentence():
    code = (
        f"{WINDOWS}import rlhfbench\n"
        "try: rlhfbench.run_sweep(rlhfbench.Sweep.from_spec({}), 'here')\n"
        "except rlhfbench.RlhfBenchError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "run needs os.fork, which this system lacks: on Windows, use its subsystem for Linux.\n"


def test_an_ascii_terminal_gets_every_table(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    code = "from rlhfbench.cli import main as cli; print('\u00b7') if cli.invoke(['models']) == 0 else 0"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout[-2:]) == (0, "", "?\n")


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


def test_report_draws_from_the_records(call, tmp_path):
    record = json.dumps({"schema": 1, "case": {"id": "a"}, "outcome": "ok"})
    (tmp_path / "records.jsonl").write_text(record + "\n")
    drawn = []

    def draw(run_dir, *, whole, with_paper):
        drawn.append((run_dir, whole, with_paper))
        return "the table"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhfbench.runs.drawing, "draw_run", draw)
        assert call("report", str(tmp_path)) == (0, "the table\n", "")
        assert call("report", str(tmp_path), "--paper") == (0, "the table\n", "")
    assert drawn == [(tmp_path, True, False), (tmp_path, True, True)]


def test_report_compares_runs(call, tmp_path):
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "records.jsonl").write_bytes((HERE / "records" / "schema1.jsonl").read_bytes())
    names = [str(tmp_path / name) for name in ("before", "after")]
    code, out, err = call("report", *names, "--out", str(tmp_path / "both"))
    assert (code, err) == (0, "")
    assert "after is faster than before in 0, slower in 0" in out
    assert out.splitlines()[-1] == f"The comparison is in {tmp_path / 'both' / 'comparison.html'}."
    assert (tmp_path / "both" / "comparison.html").is_file()


def test_a_report_that_cannot_be_written(call, tmp_path, monkeypatch):
    (tmp_path / "records.jsonl").write_text('{"schema": 1, "case": {"id": "a"}, "outcome": "ok"}\n')

    def draw(run_dir, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rlhfbench.runs.drawing, "draw_run", draw)
    code, _, err = call("report", ".")
    assert (code, err) == (2, "run '.' cannot be drawn: No space left on device.\n")


def test_methods(call):
    code, out, _ = call("methods")
    assert code == 0
    assert "hydra (Hydra-PPO): bases loaded: 1, LoRA sets: 2" in out
    rows = {row["name"]: row for row in json.loads(call("methods", "--json")[1])}
    assert set(rows) == set(METHODS)
    assert (rows["lora"]["num_bases"], rows["lora"]["num_adapter_sets"]) == (4, 2)
    assert rows["hydra"]["roles"]["critic"] == {
        "base": "hydra",
        "adapter": "critic",
        "head": "value",
        "trains": ["adapter", "head"],
    }
    assert [phase["kind"] for phase in rows["hydra"]["phases"]][:2] == ["inference", "inference"]


def test_models(call):
    code, out, _ = call("models")
    assert code == 0
    assert all(name in out for name in PRESETS)
    rows = json.loads(call("models", "--json")[1])
    assert [row["name"] for row in rows] == list(PRESETS)


def test_version_and_help(call):
    assert call("--version")[:2] == (0, f"rlhfbench {rlhfbench.__version__}\n")
    code, out, _ = call("run", "--help")
    assert code == 0
    assert "--seq-lens" in out


VERBS = ("run", "plan", "report", "watch", "gate", "verify", "evidence", "methods", "models")


@pytest.mark.parametrize("arguments", [(), *((verb,) for verb in VERBS)])
def test_help_imports_nothing_heavy(arguments):
    """Keeps ``--help`` under half a second. Newer versions of typer import pydantic to parse any command."""
    code = (
        "import sys\nfrom rlhfbench.cli import main as cli\n"
        "heavy = {'torch', 'transformers', 'pandas', 'numpy', 'matplotlib', 'psutil', 'rich', 'multiprocessing'}\n"
        "assert not (heavy | {'pydantic'}) & set(sys.modules), 'importing the verbs'\n"
        f"code = cli.invoke([*{arguments!r}, '--help'])\n"
        "sys.exit(code or sorted(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_with_examples_that_parse_and_exit_codes(call, verb):
    code, out, _ = call(verb, "--help")
    assert code == 0
    *_, examples, exit_codes = out.strip().split("\n\n")
    assert exit_codes.split()[:2] == ["Exit", "codes:"]
    assert max(map(len, out.splitlines())) <= 80
    title, *lines = examples.splitlines()
    assert title.strip() == "Examples:"
    for line in lines:
        words = line.split()
        assert words[:2] == ["rlhfbench", verb]
        assert {word for word in words if word.startswith("--")} <= set(out.split())


def test_help_of_the_application_cuts_no_summary_and_ends_with_exit_codes(call):
    code, out, _ = call("--help")
    assert code == 0
    assert "..." not in out.split("Commands:")[1]
    assert "Exit codes: 0 done, 1 the answer is no" in out


def help_by_option(text):
    """The help of each option, on one line."""
    parts = re.split(r"^  (--[\w-]+)", text, flags=re.MULTILINE)
    return {flag: " ".join(part.split()) for flag, part in zip(parts[1::2], parts[2::2], strict=True)}


def test_help_lists_options_in_sections(call):
    out = call("run", "--help")[1]
    titles = [line for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Cases:", "Training data:", "Device and weights:", "Measurement:", "Output:", "Other:"]


def test_help_states_the_real_defaults(call):
    helps = help_by_option(call("run", "--help")[1])
    options, flat, case = RunOptions(), Options().flat(), {f.name: f.default for f in dataclasses.fields(Case)}
    limit = inspect.signature(find_max_batches).parameters["limit"].default
    for flag, default in {
        "--time-budget-s": f"{options.time_budget_s:g}",
        "--case-timeout-s": f"{options.case_timeout_s:g}",
        "--max-batch-limit": limit,
        "--lora-rank": flat["lora.r"],
        "--prompt-field": flat["data.prompt_field"],
        "--seed": case["seed"],
        "--dtype": case["dtype"],
        "--methods": DEFAULT_GRID["methods"][0],
        "--setting": next(iter(SETTINGS)),
        "--model": DEFAULT_GRID["models"][0],
        "--seq-lens": f"{joined(DEFAULT_GRID['seq_lens'])}; gate: {joined(gate_verb.SMALL['seq_lens'])}",
        "--batch-sizes": f"{joined(DEFAULT_GRID['batch_sizes'])}; gate: {joined(gate_verb.SMALL['batch_sizes'])}",
    }.items():
        assert f"[default: {default}]" in helps[flag]
    gate = call("gate", "--help")[1]
    assert all(text.count("[default:") <= 1 for text in help_by_option(gate).values())


def joined(numbers):
    return ",".join(map(str, numbers))


@pytest.mark.parametrize("chars", [40, 80])
@pytest.mark.parametrize("arguments", [("methods",), ("methods", "--options"), ("models",)])
def test_lists_are_no_wider_than_the_terminal(call, monkeypatch, arguments, chars):
    monkeypatch.setenv("COLUMNS", str(chars))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out = re.sub(r"\x1b\[[0-9;]*m", "", call(*arguments)[1])
    assert max(map(len, out.splitlines())) <= chars
    assert "…" not in out


def test_a_table_in_a_pipe_is_200_columns_wide(capsys):
    columns = [Column(heading=f"heading {i}", cells=["1234567"]) for i in range(16)]
    common.print_table(terminal("", columns))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert len(lines[0].rstrip()) == 10 * 9 + 6 * 10 + 15 * 2


def test_plan_takes_every_option_of_run_that_defines_a_case(call):
    def options(verb):
        return set(help_by_option(call(verb, "--help")[1]))

    only_run = {
        "--time-budget-s", "--blocks", "--case-timeout-s", "--memory-limit", "--threads", "--profile", "--with-plan",
        "--max-batch", "--max-batch-limit", "--resume", "--retry",
    }  # fmt: skip
    assert options("run") - options("plan") == only_run
    assert options("plan") - options("run") == {"--gpu", "--zero-stage", "--world-size", "--global-batch"}


def test_methods_lists_the_options_by_group_with_default_rule_and_meaning(call):
    code, out, _ = call("methods", "--options")
    assert code == 0
    assert "  ppo.kl_coef=0.02  (a finite number of at least 0)\n      β of the per-token penalty" in out
    assert "  engine.gradient_checkpointing=false  (true or false)\n" in out
    assert [line for line in out.splitlines() if line and not line.startswith(" ")] == [
        group.name for group in dataclasses.fields(Options)
    ]
    rows = json.loads(call("methods", "--options", "--json")[1])
    assert {row["name"]: row["default"] for row in rows} == Options().flat()
    assert all(set(row) == {"name", "default", "rule", "meaning"} for row in rows)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GiB", 4 * 2**30),
        ("1.5 KiB", 1536),
        ("500MB", 500_000_000),
        ("2k", 2000),
        ("123", 123),
        ("7B", 7),
        ("1tib", 2**40),
    ],
)
def test_sizes(text, expected):
    assert parse_size("--memory-limit", text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "4 Gib ibs", "4XB", "nan"])
def test_invalid_sizes(text):
    with pytest.raises(SweepError, match="must be a size like 4GiB"):
        parse_size("--memory-limit", text)


def test_the_public_names():
    assert sorted(rlhfbench.__all__) == [
        "ForkServerError",
        "Ledger",
        "RecordsError",
        "RlhfBenchError",
        "RunFolderError",
        "RunOptions",
        "Sweep",
        "SweepError",
        "__version__",
        "plan",
        "read_records",
        "records_frame",
        "run_sweep",
    ]
    assert all(getattr(rlhfbench, name) is not None for name in rlhfbench.__all__)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        rlhfbench.absent  # noqa: B018


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("method", "flag", "text", "sentence"),
    [
        ("dpo", "--pairs", None, "pairs 'x.jsonl' cannot be read: No such file or directory."),
        ("dpo", "--pairs", "", "pairs 'x.jsonl' is empty: it must hold at least one row."),
        ("dpo", "--pairs", '{"prompt": "a",\n', "pairs 'x.jsonl', line 1: it is not JSON."),
        (
            "dpo",
            "--pairs",
            '{"prompt": "a", "chosen": "b"}\n',
            "pairs 'x.jsonl', line 1: there is no field 'rejected'; its fields are 'prompt', 'chosen'.",
        ),
        (
            "sft",
            "--demonstrations",
            '{"prompt": "a", "completion": ""}\n',
            "demonstrations 'x.jsonl', line 1: field 'completion' must be a text that is not empty, or a list of "
            "messages (role, content).",
        ),
        (
            "dpo",
            "--pairs",
            '{"prompt": "a", "chosen": "b", "rejected": "b"}\n',
            "pairs 'x.jsonl': chosen equals rejected in every row, so no pair is left.",
        ),
        ("hydra", "--pairs", "", "data.pairs is 'x.jsonl': method 'hydra' takes prompts, so it must be none."),
    ],
)
def test_a_bad_data_file_is_one_sentence_and_starts_nothing(call, tmp_path, method, flag, text, sentence):
    if text is not None:
        (tmp_path / "x.jsonl").write_text(text)
    small = ("--model", "tiny", "--seq-lens", "8", "--batch-sizes", "1")
    code, out, err = call("run", "--methods", method, *small, flag, "x.jsonl", "--out", "here")
    assert (code, out, err) == (2, "", sentence + "\n")
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "one of --base, --baseline, --self-test and --bisect must be given, and only one."),
        (("--base", "a", "--self-test"), "one of --base, --baseline, --self-test and --bisect must be given"),
        (("--base", "a", "--memory-only"), "--update-baseline and --memory-only need --baseline RUN."),
        (("--base", "a", "--budget-s", "0"), "--budget-s is 0: it must be from 4"),
        (("--base", "a", "--budget-s", "nan"), "--budget-s is nan"),
        (("--base", "a", "--smallest-effect", "0.2"), "--promised-effect is 0.05: it must be above --smallest-effect"),
        (("--base", "a", "--smallest-effect", "-1"), "--smallest-effect is -1: it must be above 0 and below 10."),
        (("--base", "a", "--step", "mine"), "--step is 'mine': it must be MODULE:FUNCTION."),
        (("--base", "a", "--threads", "0"), "--threads is 0: it must be from 1 to 1024."),
        (("--base", "a"), "--base needs a git repository"),
        (("--bisect", "a", "b"), "--base needs a git repository"),
        (("--baseline", "nowhere"), "baseline 'nowhere' holds no run"),
        (("--baseline", "nowhere", "--methods", "hydra"), "--baseline takes no cases"),
    ],
)
def test_a_wrong_gate_is_one_sentence(call, monkeypatch, tmp_path, arguments, sentence):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    code, out, err = call("gate", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(sentence) or sentence in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_gate_against_a_stored_run(call, fake, monkeypatch, tmp_path):
    assert call("run", *SMALL, *kind("steady"), "--blocks", "2", "--out", "stored")[0] == 0
    code, out, _ = call("gate", "--baseline", "stored", "--out", "new", "--update-baseline")
    assert code == 0
    assert out.startswith("**No regression.**")
    assert read_records("stored") == read_records("new")
    assert call("gate", "--baseline", "stored")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"stored", "new"}  # without --out nothing is kept
    path = tmp_path / "stored" / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "host": "another"}))
    code, out, _ = call("gate", "--baseline", "stored", "--out", "later", "--json")
    assert code == 3
    reasons = {found["reason"] for found in json.loads(out)["findings"]}
    assert any(reason and reason.startswith("Times are not judged: host") for reason in reasons)
    assert call("gate", "--baseline", "stored", "--out", "last", "--memory-only")[0] == 0


def test_a_first_baseline_is_made(call, fake, tmp_path):
    code, _, err = call("gate", "--baseline", "new", "--update-baseline", *SMALL, *kind("steady"))
    assert code == 3  # nothing was compared
    assert "is new: there was nothing to compare with." in err
    assert call("gate", "--baseline", "new")[0] == 0


def test_an_interrupted_gate_leaves_the_baseline_as_it_was(call, fake, monkeypatch, tmp_path):
    assert call("run", *SMALL, *kind("steady"), "--blocks", "2", "--out", "stored")[0] == 0
    before = (tmp_path / "stored" / "records.jsonl").read_bytes()
    interrupted = RunResult(run_dir=tmp_path / "x", records=[], interrupted=True)
    monkeypatch.setattr(rlhfbench.gate.baseline, "run_sweep", lambda *args, **kwargs: interrupted)
    assert call("gate", "--baseline", "stored", "--update-baseline")[:2] == (130, "")
    assert (tmp_path / "stored" / "records.jsonl").read_bytes() == before
