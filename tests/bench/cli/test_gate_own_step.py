"""``gate`` of a small repository with the manual's step, in real processes: nothing is faked."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from rlhfbench.gate.sides import git

PAGE = (Path(__file__).parents[3] / "docs" / "gate.md").read_text(encoding="utf-8")
(STEP,) = re.findall(r'```python title="bench_step.py"\n(.*?)```', PAGE, re.DOTALL)
LAST_LINE_OF_ROLLOUT = "            target = self.model(self.rows)\n"


@pytest.fixture
def repo(monkeypatch, tmp_path):
    """A repository of two commits: the step of the first holds 4 bytes from its first phase on, the second 64 KiB."""
    assert STEP.count(LAST_LINE_OF_ROLLOUT) == 1
    root, temporary = tmp_path / "repo", tempfile.mkdtemp()
    root.mkdir()
    monkeypatch.chdir(root)
    monkeypatch.setattr(tempfile, "tempdir", temporary)  # the lock of this machine's gates lies there
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "a@b")
    git("init", "-q")
    Path(".gitignore").write_text("__pycache__/\n")
    for held_bytes in (4, 65536):
        held = f"{LAST_LINE_OF_ROLLOUT}            self.held = torch.zeros({held_bytes // 4})\n"
        Path("bench_step.py").write_text(STEP.replace(LAST_LINE_OF_ROLLOUT, held))
        git("add", "-A")
        git("commit", "-q", "-m", f"{held_bytes} bytes are held")
    yield root
    shutil.rmtree(temporary)


def test_a_tensor_that_is_held_too_long_is_found(call, repo):
    cases = ("--methods", "full", "--seq-lens", "32", "--batch-sizes", "4", "--budget-s", "4", "--threads", "1")
    code, said, err = call("gate", "--base", "HEAD~1", "--step", "bench_step:make_step", *cases, "--json")
    assert code == 1, err
    found = {finding["quantity"]: finding for finding in json.loads(said)["findings"]}
    total = found["memory total"]
    # That of the step before still lives when a step makes its own.
    assert (total["verdict"], total["head"] - total["base"]) == ("larger", 2 * (65536 - 4))
    assert (found["memory part base"]["verdict"], found["memory part base"]["head"]) == ("same", 4 * (64 * 64 + 64))
    assert {"total s", "rollout s", "train s"} <= found.keys()
    assert found["total s"]["num_pairs"] >= 4
    assert git("status", "--porcelain") == ""


def test_a_gate_that_is_killed_leaves_no_process_and_no_file(repo, is_gone):
    """kill -9 while a case steps: nothing of the gate's own code runs any more."""
    waits = f"{LAST_LINE_OF_ROLLOUT}            open('pid', 'w').write(str(os.getpid())); signal.pause()\n"
    Path("bench_step.py").write_text("import os, signal\n" + STEP.replace(LAST_LINE_OF_ROLLOUT, waits))
    os.mkfifo("pid")
    temporary = Path(tempfile.gettempdir())
    command = [sys.executable, "-m", "rlhfbench", "gate", "--base", "HEAD", "--step", "bench_step:make_step"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    gate = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(temporary)}, **quiet)
    # The head's case: the base's module writes no pid. A case is measured on one side after the other.
    case = psutil.Process(int(Path("pid").read_text()))
    server = case.parent()
    started = gate_processes(gate.pid)
    assert {case.pid, server.pid} <= started
    gate.kill()
    gate.wait()
    assert all(is_gone(pid) for pid in started)
    assert [path.name for path in temporary.iterdir() if path.suffix != ".lock"] == []


def gate_processes(pid):
    return {process.pid for process in psutil.Process(pid).children(recursive=True)}
