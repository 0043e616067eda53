"""Systems without fork, streams that are closed, and terminals without Unicode."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhfbench.records.file import read_records

FULL = Path("/dev/full")
SMALL = ("--methods", "hydra", "--seq-lens", "8", "--batch-sizes", "1")


def kind(name):
    return ("--option", f"data.prompt_field={name}")


@pytest.mark.parametrize("verb", [["run"], ["gate", "--base", "HEAD"]])
def test_a_system_without_fork_says_so_before_anything_is_imported_or_written(tmp_path, verb):
    code = (
        "import os, sys, psutil\ndel os.fork\nsys.modules['resource'] = sys.modules['fcntl'] = None\n"
        "from rlhfbench.cli import main as cli\nsys.exit(cli.invoke([*sys.argv[1:], '--out', 'here']))"
    )
    done = subprocess.run([sys.executable, "-c", code, *verb], capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1)
    assert "measuring needs os.fork, which this system lacks" in done.stderr
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


@pytest.mark.parametrize(("behaviour", "code", "more"), [("ok", 0, ("--json",)), ("exit", 3, ())])
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


@pytest.mark.skipif(not FULL.exists(), reason="it needs a file that is always full")
def test_output_that_a_full_disk_loses_is_one_sentence():
    code = "import sys; from rlhfbench.cli import main; sys.argv[1:] = ['models', '--json']; main.main()"
    with FULL.open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "standard output cannot be written: No space left on device.\n")


def test_ctrl_c_during_the_first_imports_prints_no_traceback():
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from rlhfbench.__main__ import run\n"
        "run()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


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
    assert done.stdout == "measuring needs os.fork, which this system lacks: on Windows, use its subsystem for Linux.\n"


def test_an_ascii_terminal_gets_every_table(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    code = "from rlhfbench.cli import main as cli; print('\u00b7') if cli.invoke(['models']) == 0 else 0"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout[-2:]) == (0, "", "?\n")
