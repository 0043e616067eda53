from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlhfbench import processes as parallel
from rlhfbench.errors import ForkServerError, SweepError
from rlhfbench.processes import map_parallel, num_oom_kills
from rlhfkernels.errors import CaseError


def pid_and_square(number: int) -> tuple[int, int]:
    return os.getpid(), number * number


def refuse(number: int) -> None:
    raise (CaseError if number % 2 else SweepError)([f"number is {number}.", "it must be none."])


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "num_cores", lambda: 2)


def test_results_come_from_other_processes_in_the_order_of_the_inputs() -> None:
    results = map_parallel(pid_and_square, [3, 1, 2], preload=[])
    assert [square for _, square in results] == [9, 1, 4]
    assert os.getpid() not in {pid for pid, _ in results}


def test_ctrl_c_while_the_server_imports_prints_nothing(tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from rlhfbench import processes\n"
        "processes.num_cores = lambda: 2\n"
        "print(processes.map_parallel(abs, [-1, -2], preload=['interrupted']))"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command, environment = [sys.executable, "-c", code, str(tmp_path)], {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[1, 2]\n", "")


def test_one_input_or_one_core_needs_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert map_parallel(pid_and_square, [3], preload=[]) == [(os.getpid(), 9)]
    assert map_parallel(pid_and_square, [], preload=[]) == []
    monkeypatch.setattr(parallel, "num_cores", lambda: 1)
    assert {pid for pid, _ in map_parallel(pid_and_square, [3, 4], preload=[])} == {os.getpid()}


def test_this_process_works_while_another_one_imports() -> None:
    done: list[int] = []
    map_parallel(pid_and_square, [3, 4], preload=[], meanwhile=lambda: done.append(os.getpid()))
    map_parallel(pid_and_square, [3], preload=[], meanwhile=lambda: done.append(0))  # nothing is imported elsewhere
    assert done == [os.getpid()]


@pytest.mark.parametrize(("number", "kind"), [(1, CaseError), (2, SweepError)])
def test_a_users_mistake_comes_back_with_its_problems(number: int, kind: type[CaseError | SweepError]) -> None:
    with pytest.raises(kind) as caught:
        map_parallel(refuse, [number, number], preload=[])
    assert caught.value.problems == (f"number is {number}.", "it must be none.")


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(ForkServerError, match="a worker process ended"):
        map_parallel(die, [1, 2], preload=[])


@pytest.mark.parametrize(
    ("text", "num_kills"), [("oom_kill 3\noom_kill_others 5\n", 3), ("nr_dirty 7\n", 0), (None, 0)]
)
def test_oom_kills_are_those_that_linux_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, num_kills: int
) -> None:
    if text is not None:
        (tmp_path / "vmstat").write_text(text)
    monkeypatch.setattr(parallel, "Path", {"/proc/vmstat": tmp_path / "vmstat"}.__getitem__)
    assert num_oom_kills() == num_kills


def test_one_thread_at_a_time_keeps_the_working_folder_off_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another's "1" would be taken for what the user has set, and stay."""
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with parallel._safe_path():
        assert parallel._PATH_LOCK.locked()
        assert os.environ["PYTHONSAFEPATH"] == "1"
    assert not parallel._PATH_LOCK.locked()
    assert "PYTHONSAFEPATH" not in os.environ


def test_modules_of_the_working_folder_do_not_replace_the_standard_librarys(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong one')\n")
    script = tmp_path / "below" / "script.py"  # its own folder is on its path, and not the working folder
    script.parent.mkdir()
    script.write_text(
        "from rlhfbench import processes\n"
        "if __name__ == '__main__':\n"
        "    processes.num_cores = lambda: 2\n"
        "    print(processes.map_parallel(abs, [-1, -2], preload=[]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.pop("PYTHONSAFEPATH", None)
    command = [sys.executable, str(script)]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (found.stdout, found.stderr) == ("[1, 2]\n", "")
