"""The command that counts false alarms: what it goes on with, and what it says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import psutil
import pytest

from rlhfbench.gate.decide import estimate
from rlhfbench.gate.findings import Finding
from rlhfkernels.config.case import Case

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gate" / "false_alarms.py"
CASE = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=2)


def finding(quantity, verdict):
    return Finding(case=CASE, quantity=quantity, verdict=verdict, estimate=estimate([0.1, 0.1]))


@pytest.fixture
def count(monkeypatch, tmp_path, capsys):
    """Returns a function that runs the command; a gate is asked for what ``gates`` says of it."""
    spec = importlib.util.spec_from_file_location("false_alarms", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    commits = iter(["c1", "c1", "c2"])
    monkeypatch.setattr(script.sides, "repository", lambda: tmp_path)
    monkeypatch.setattr(script.sides, "commit_of", lambda revision, root: next(commits))
    monkeypatch.setattr(script.tempfile, "tempdir", str(tmp_path))  # the lock of this machine's gates lies there
    asked = []

    def run(num_gates, verdicts=("same", "ambiguous")):
        def gate(root, commit, budget_s, *, seed):
            asked.append(seed)
            return [finding(f"{name} s", verdict) for name, verdict in zip(("total", "score"), verdicts, strict=True)]

        monkeypatch.setattr(script, "_gate", gate)
        monkeypatch.setattr(sys, "argv", ["false_alarms.py", str(tmp_path / "out"), "--gates", str(num_gates)])
        return script.main(), capsys.readouterr().out, asked

    run.error = script.GateError
    return run


def test_it_goes_on_where_it_was_interrupted_and_counts_cases_with_an_alarm(count, tmp_path):
    code, said, asked = count(1)
    assert (code, asked) == (0, [0, 0])
    assert "on the machine as it is: 0 false alarms and 1 without an answer in 1 comparisons" in said
    assert not [child for child in psutil.Process().children() if "os.getppid() == parent" in " ".join(child.cmdline())]
    code, said, asked = count(2, ("slower", "faster"))
    assert (code, asked) == (1, [0, 0, 1, 1])
    assert "beside a busy process: 1 false alarms and 1 without an answer in 2 comparisons" in said
    rows = [json.loads(line) for line in (tmp_path / "out" / "comparisons.jsonl").read_text().splitlines()]
    assert [(row["gate"], row["busy"]) for row in rows] == [(0, False), (0, True), (1, False), (1, True)]
    assert rows[-1]["alarms"] == {"total s": "slower", "score s": "faster"}
    with pytest.raises(count.error, match="of another commit"):
        count(3)
