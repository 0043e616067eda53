"""The command that counts the answers of real comparisons: what it goes on with, and what it says."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from rlhfbench.gate.decide import estimate
from rlhfbench.gate.findings import Finding
from rlhfbench.gate.other_rules import OTHERS
from rlhfbench.gate.pairs import BlockPair
from rlhfbench.gate.simulation import MeasuredCase
from rlhfkernels.config.case import Case

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gate" / "comparisons.py"
CASE = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=2)
OTHER = dataclasses.replace(CASE, method="lora")
KINDS = {"generate": "inference", "optimize": "update"}
VALUES = {"generate": 2.0, "optimize": 1.0, "inference": 2.0, "update": 1.0, "total": 3.0}
PAIRS = [BlockPair(base=VALUES, head=VALUES, ratios={}, steps=([], []), disturbed=(False, False))]

# By the other rules, in each gate: a slower case with an alarm, and nothing.
FLAGGED = dict(zip(OTHERS, (["generate", "optimize"], []), strict=True))


def busy_processes():
    return [child for child in psutil.Process().children() if "os.getppid() == parent" in " ".join(child.cmdline())]


def finding(case, quantity, verdict):
    return Finding(case=case, quantity=quantity, verdict=verdict, estimates=[estimate([0.1, 0.1])])


@pytest.fixture
def count(monkeypatch, tmp_path, capsys):
    """Returns a function that runs the command; a gate is asked for what ``gates`` says of it."""
    spec = importlib.util.spec_from_file_location("comparisons", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    versions = iter(["v1", "v1", "v2"])
    measured = [MeasuredCase(case_id=case.id, kinds=KINDS, pairs=PAIRS, spent_s=1.0) for case in (CASE, OTHER)]
    monkeypatch.setattr(script.sides, "repository", lambda: tmp_path)
    monkeypatch.setattr(script.sides, "commit_of", lambda revision, root: "c1")
    judgement = script._judgement
    monkeypatch.setattr(script, "_judgement", lambda root, commit: next(versions))
    monkeypatch.setattr(script, "_measured_cases", lambda root, commit: measured)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the lock of this machine's gates lies there
    asked = []

    def run(num_gates, verdicts=("same", "ambiguous"), *options):
        def gate(root, commit, given, slowed, *, seed):
            asked.append(seed)
            run.num_busy.append(len(busy_processes()))
            case = next((case for case in (CASE, OTHER) if case.id in [each.case_id for each in slowed]), CASE)
            names = zip(run.quantities, verdicts, strict=True)
            others = {case.id: {name: [f"{time} s" for time in times] for name, times in FLAGGED.items()}}
            return [finding(case, name, verdict) for name, verdict in names], {case.id: 7.0}, others

        monkeypatch.setattr(script, "_gate", gate)
        arguments = ["comparisons.py", str(tmp_path / "out"), "--gates", str(num_gates), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        return script.main(), capsys.readouterr().out, asked

    run.script, run.judgement, run.error = script, judgement, script.GateError
    run.num_busy = []
    run.quantities = ("total s", "score s")
    return run


def test_it_goes_on_where_it_was_interrupted_and_counts_cases_with_an_alarm(count, tmp_path):
    code, said, asked = count(1)
    assert (code, asked) == (0, [0])
    assert "all: 0 false alarms and 1 without an answer in 1 comparisons" in said
    code, said, asked = count(2, ("slower", "faster"))
    assert (code, asked) == (1, [0, 1])
    assert "10 % on means: 2 false alarms\n" in said
    assert "all: 1 false alarms and 1 without an answer in 2 comparisons" in said
    rows = [json.loads(line) for line in (tmp_path / "out" / "comparisons.jsonl").read_text().splitlines()]
    assert [(row["gate"], row["busy"]) for row in rows] == [(0, False), (1, False)]
    assert rows[-1]["alarms"] == {"total s": "slower", "score s": "faster"}
    with pytest.raises(count.error, match="by other code"):
        count(3)


def test_a_busy_process_runs_beside_its_gates_alone(count):
    code, said, asked = count(1, ("same", "same"), "--busy", "--first", "3")
    assert (code, asked, count.num_busy) == (0, [3], [1])
    assert "gate 3: 0 false alarms" in said
    assert busy_processes() == []
    with pytest.raises(count.error, match="fault, load or --budget-s"):
        count(1)


def test_a_slower_case_is_found_by_what_its_longest_phase_is_part_of(count, tmp_path):
    """A time that the phase is no part of is a false alarm."""
    code, said, _ = count(1, ("slower", "slower"), "--slower", "0.1")
    assert "all: 1 of 1 slower cases found, 1 false alarms and 0 without an answer" in said
    assert "7 s a case" in said
    assert "10 % on means: 1 of 1 slower cases found, 1 false alarms\n" in said
    assert "asv's factor 1.1: 0 of 1 slower cases found, 0 false alarms\n" in said
    assert code == 1
    (row,) = map(json.loads, (tmp_path / "out" / "comparisons.jsonl").read_text().splitlines())
    assert (row["slowed"], row["slower"], row["alarms"]) == ("generate", 0.1, {"score s": "slower"})
    with pytest.raises(count.error, match="other code, fault, load"):
        count(1)


def test_a_held_tensor_is_found_by_any_memory_that_is_larger(count, tmp_path):
    """A false alarm is all else that is called changed, and every time that another rule flags."""
    count.quantities = ("memory total", "memory part activations", "total s")
    code, said, _ = count(1, ("larger", "smaller", "slower"), "--held")
    assert "all: 1 of 1 held tensors found, 1 false alarms and 0 without an answer" in said
    assert "10 % on means: 1 false alarms\n" in said
    assert code == 1
    (row,) = map(json.loads, (tmp_path / "out" / "comparisons.jsonl").read_text().splitlines())
    assert (row["held"], row["slowed"], row["found"]) == (True, None, True)
    assert row["alarms"] == {"memory part activations": "smaller", "total s": "slower"}
    with pytest.raises(count.error, match="other code, fault"):
        count(1)


def test_a_tensor_is_held_in_the_head_of_every_case(count, monkeypatch, tmp_path):
    faults = []

    class Comparison:
        spent_s: ClassVar = {}

        def run(self, fault):
            faults.append(fault)
            return []

    monkeypatch.setattr(count.script, "_comparison", lambda *_: contextlib.nullcontext((Comparison(), tmp_path)))
    monkeypatch.setattr(count.script, "measured_cases", lambda *_: [])
    for held in (True, False):
        given = argparse.Namespace(held=held, slower=0.0, budget_s=60.0)
        count.script._gate(tmp_path, "c1", given, [], seed=0)
    assert [fault and fault(CASE) for fault in faults] == [{"held_bytes": 65536}, None]


def test_a_held_tensor_that_was_not_found(count):
    count.quantities = ("memory total", "total s")
    code, said, _ = count(1, ("same", "same"), "--held")
    assert (code, "all: 0 of 1 held tensors found, 0 false alarms" in said) == (0, True)


def test_rows_from_before_budgets_and_held_tensors_were_recorded_count(count, tmp_path):
    count(1)
    path = tmp_path / "out" / "comparisons.jsonl"
    row = json.loads(path.read_text())
    assert (row.pop("budget_s"), row.pop("held")) == (60.0, False)
    path.write_text(json.dumps(row) + "\n")
    assert "in 2 comparisons" in count(2)[1]


def test_comparisons_within_another_time_do_not_count_together(count):
    count(1, ("same", "same"), "--budget-s", "30")
    with pytest.raises(count.error, match="or --budget-s: name a new folder"):
        count(1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--gates", "0"), "'0' must be a number of gates above 0."),
        (("--gates", "x"), "'x' must be a number of gates above 0."),
        (("--budget-s", "0"), "'0' must be from 4, for four pairs of blocks, to 1000000."),
        (("--budget-s", "nan"), "'nan' must be from 4"),
        (("--held", "--slower", "0.1"), "not allowed with argument"),
    ],
)
def test_what_cannot_be_counted_is_refused(count, capsys, arguments, sentence):
    with pytest.raises(SystemExit, match="2"):
        count(1, ("same", "same"), *arguments)
    assert sentence in capsys.readouterr().err


@pytest.fixture
def commit(count, tmp_path):
    """Makes the folder a repository with the files that decide; returns a function that commits a file."""

    def commit(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        for words in (("add", "."), (*who, "commit", "-qm", text)):
            subprocess.run(["git", *words], cwd=tmp_path, check=True)

    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    for path in count.script._JUDGEMENT:
        commit(path, path)
    return commit


def test_comparisons_count_together_as_long_as_the_code_that_decides_is_the_same(count, commit, tmp_path):
    first = count.judgement(tmp_path, "HEAD")
    for elsewhere in ("README.md", "bench/rlhfbench/gate/selftest.py"):
        commit(elsewhere, "elsewhere")
    assert count.judgement(tmp_path, "HEAD") == first
    commit("bench/rlhfbench/gate/decide.py", "changed")
    assert count.judgement(tmp_path, "HEAD") != first


def test_code_that_decides_and_is_not_committed_is_refused(count, commit, tmp_path):
    commit("bench/rlhfbench/gate/selftest.py", "elsewhere")
    (tmp_path / "bench/rlhfbench/gate/selftest.py").write_text("changed")
    count.judgement(tmp_path, "HEAD")
    (tmp_path / "bench/rlhfbench/gate/decide.py").write_text("changed")
    with pytest.raises(count.error, match=r"^'bench/rlhfbench/gate/decide.py' has uncommitted changes, and decides"):
        count.judgement(tmp_path, "HEAD")
