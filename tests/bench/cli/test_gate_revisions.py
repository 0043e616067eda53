"""``gate`` between revisions of a repository with fake cases, which are as slow and as large as ``mine.py`` says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import psutil
import pytest

import rlhfbench.gate
from rlhfbench.cases.sweep import Sweep
from rlhfbench.cli.gate_output import Output
from rlhfbench.errors import GateError
from rlhfbench.gate import compare, selftest, simulation
from rlhfbench.gate.compare import GateOptions
from rlhfbench.gate.sides import git
from rlhfbench.measure import turns
from rlhfbench.records.file import read_records
from rlhfbench.runs.forkserver import ForkServer
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options

CASES = ("--methods", "hydra", "--seq-lens", "8", "--batch-sizes", "1")
# The step is not run: with it, modules come from the working folder.
REVISION = (*CASES, "--option", "data.prompt_field=revision", "--step", "mine:unused")
LARGER = "FAULT = {'held_bytes': 1}"


@pytest.fixture
def temporary(monkeypatch):
    """The folder of temporary files, with a path that is short enough for sockets."""
    folder = Path(tempfile.mkdtemp())
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def commit(monkeypatch, tmp_path, temporary, fake_case_path):
    """Makes the working folder a repository; returns a function that commits ``mine.py`` with the given content."""
    monkeypatch.setattr(turns, "_MAX_ROUNDS", 20)  # steps of fake cases take no time
    monkeypatch.setattr(
        compare,
        "ForkServer",
        lambda paths, optional: ForkServer(target="fake_case:run_case", preload=(), paths=paths),
    )
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "a@b")
    root = tmp_path / "repo"
    root.mkdir()
    monkeypatch.chdir(root)
    git("init", "-q")

    def commit(content, subject):
        Path("mine.py").write_text(content + "\n")
        git("add", "-A")
        git("commit", "-q", "--allow-empty", "-m", subject)
        return git("rev-parse", "HEAD")

    return commit


def left_in(folder):
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def test_a_change_is_found_between_the_working_tree_and_a_revision(call, commit, temporary, tmp_path):
    commit("FAULT = {}", "first")
    commit(LARGER, "second")
    out, table = tmp_path / "out", tmp_path / "table.md"
    code, said, err = call("gate", "--base", "HEAD~1", *REVISION, "--out", str(out), "--summary", str(table))
    assert code == 1, err
    assert said.startswith("**Regression: 1 quantity.** the working tree at ")
    assert "| memory total | 0.000 MiB | 0.000 MiB | 1.1667 | larger |" in said
    assert table.read_text() == said
    assert [read_records(out / side)[0]["memory"]["total_bytes"] for side in ("base", "head")] == [6, 7]
    code, said, _ = call("gate", "--base", "HEAD", *REVISION, "--json")
    assert (code, json.loads(said)["exit_code"]) == (0, 0)
    assert left_in(temporary) == []


def test_a_gate_of_a_commit_with_itself_says_so(call, commit):
    commit("FAULT = {}", "first")
    # Its own files are no change.
    code, said, err = call("gate", "--base", "HEAD", *REVISION, "--json", "--out", "runs")
    assert code == 0, err
    assert json.loads(said)["note"] == "Base and head are the same commit: there was no change to judge."


def test_a_bisect_prints_the_commit_as_a_table_as_json_and_in_a_file(call, commit, temporary, tmp_path):
    commit("FAULT = {}", "good")
    commit("FAULT = {}  # the same", "good too")
    culprit = commit(LARGER, "the culprit")
    commit(LARGER + "  # still", "later")
    table = tmp_path / "table.md"
    ends = ("--bisect", "HEAD~3", "HEAD")
    code, said, err = call("gate", *ends, *REVISION, "--json", "--summary", str(table))
    assert code == 1, err
    found = json.loads(said)
    assert (found["exit_code"], found["commit"]) == (1, culprit)
    assert found["head"] == f"{culprit[:10]} (the culprit)"
    assert table.read_text().startswith(f"**Regression: 1 quantity.** {culprit[:10]} (the culprit) against HEAD~3 (")
    judged = [line.split(" ", 1)[1] for line in err.splitlines() if "memory total: " in line]
    assert [line.partition("):")[0] for line in judged] == [
        "bad (memory total: 1.1667",
        "bad (memory total: 1.1667",
        "good (memory total: 1.0000",
    ]
    assert left_in(temporary) == []


def test_a_bisect_names_commits_that_it_could_not_judge_in_every_output(call, commit, tmp_path):
    commit("FAULT = {}", "good")
    broken = commit("import os; os._exit(7)", "broken")
    commit(LARGER, "bad")
    table = tmp_path / "table.md"
    code, said, err = call("gate", "--bisect", "HEAD~2", "HEAD", *REVISION, "--json", "--summary", str(table))
    assert code == 1, err
    assert json.loads(said)["unjudged"] == [broken]
    assert json.loads(said)["note"].endswith(f": {broken[:10]}.")
    assert table.read_text().endswith(f"one of them may be the first bad one: {broken[:10]}.\n")


@pytest.mark.parametrize(
    ("good", "code", "sentence"),
    [
        ("FAULT = {}", 0, "HEAD shows no regression against HEAD~1: there is nothing to find."),
        ("import os; os._exit(7)", 3, "HEAD could not be judged against HEAD~1: whether there is a commit to find"),
    ],
)
def test_a_bisect_tells_a_good_end_from_one_that_it_cannot_judge(call, commit, tmp_path, good, code, sentence):
    commit(good, "good")
    commit("FAULT = {}  # the same", "bad?")
    table = tmp_path / "table.md"
    ends = ("--bisect", "HEAD~1", "HEAD")
    found, said, _ = call("gate", *ends, *REVISION, "--summary", str(table))
    assert (found, said.startswith(sentence)) == (code, True)
    assert said.endswith(table.read_text())
    found, said, err = call("gate", *ends, *REVISION, "--json")
    assert (found, json.loads(said)["commit"]) == (code, None)
    assert sentence in err


def test_a_self_test_prints_its_lines_and_stores_them(call, commit, monkeypatch, tmp_path):
    monkeypatch.setattr(selftest, "SLOWDOWNS", (0.2,))
    monkeypatch.setattr(simulation, "NUM_TRIES", 5)
    monkeypatch.setattr(compare, "MAX_LOOKS", 1)
    table = tmp_path / "table.md"
    steady = (*CASES, "--option", "data.prompt_field=steady", "--self-test")
    code, said, err = call("gate", *steady, "--summary", str(table))
    assert code == 0, err
    assert "held over a step: found in 1 of 1 cases" in said
    assert table.read_text() == f"```\n{said}```\n"


def test_a_self_test_as_json_has_what_was_measured_and_what_was_simulated(call, commit, monkeypatch):
    monkeypatch.setattr(selftest, "SLOWDOWNS", (0.2,))
    monkeypatch.setattr(simulation, "NUM_TRIES", 5)
    monkeypatch.setattr(compare, "MAX_LOOKS", 1)
    code, said, err = call("gate", *CASES, "--option", "data.prompt_field=steady", "--self-test", "--json")
    assert code == 0, err
    found = json.loads(said)
    assert (found["num_cases"], found["not_measured"], found["false_alarms"]) == (1, [], [])
    assert found["held"] == {"bytes": 65536, "num_found": 1}
    assert found["slowed"] == [{"slowdown": 0.2, "num_found": 1, "num_ambiguous": 0}]
    assert [(row["slowdown"], row["found"]) for row in found["rates"]] == [(0.0, 0.0), (0.2, 1.0)]
    assert found["promised_slowdown"] == 0.2
    # Of the cases beside the slower one: there is none.
    assert {row["false_alarms"] for row in found["rates"]} == {None}
    assert "false alarms elsewhere" not in err


def test_a_self_test_names_cases_that_could_not_be_measured(call, commit, monkeypatch, tmp_path):
    monkeypatch.setattr(selftest, "SLOWDOWNS", (0.2,))
    monkeypatch.setattr(simulation, "NUM_TRIES", 1)
    monkeypatch.setattr(compare, "MAX_LOOKS", 1)
    (tmp_path / "both.toml").write_text('[options.data]\nprompt_field = ["steady", "exit"]\n')
    both = ("--sweep", str(tmp_path / "both.toml"), "--self-test")
    _, said, err = call("gate", *CASES, *both)
    assert "could not be measured: base: crashed: it exited with status 7" in said.partition("\n")[0], err
    _, said, _ = call("gate", *CASES, *both, "--json")
    (failed,) = json.loads(said)["not_measured"]
    assert (failed["verdict"], failed["case"]["options"]["data"]["prompt_field"]) == ("failed", "exit")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--summary", "nowhere/table.md"), "--summary 'nowhere/table.md' cannot be written: there is no folder"),
        (("--summary", "."), "--summary '.' is a folder: name a file."),
        (("--out", "."), "--out '.' holds files: a gate needs an empty or a new folder."),
        (("--out", "mine.py"), "--out 'mine.py' is not a folder: name an empty or a new one."),
    ],
)
@pytest.mark.parametrize("mode", [("--base", "HEAD"), ("--bisect", "HEAD", "HEAD"), ("--self-test",)])
def test_output_that_cannot_be_kept_is_found_before_anything_starts(
    call, commit, monkeypatch, mode, arguments, sentence
):
    commit("FAULT = {}", "first")
    monkeypatch.setattr(compare.Comparison, "run", lambda *_: pytest.fail("it started"))
    code, said, err = call("gate", *mode, *REVISION, *arguments)
    assert (code, said) == (2, "")
    assert sentence in err
    assert "--resume" not in err


def test_the_answer_stands_where_the_summary_is_lost_on_the_way(call, commit, monkeypatch, tmp_path):
    commit("FAULT = {}", "first")
    commit(LARGER, "second")
    (tmp_path / "folder").mkdir()
    run = compare.Comparison.run

    def run_and_remove(self):
        (tmp_path / "folder").rmdir()
        return run(self)

    monkeypatch.setattr(compare.Comparison, "run", run_and_remove)
    summary = str(tmp_path / "folder" / "table.md")
    code, said, err = call("gate", "--base", "HEAD~1", *REVISION, "--summary", summary)
    assert (code, said[:14]) == (1, "**Regression: ")
    assert f"--summary '{summary}' cannot be written" in err


def test_a_name_that_is_no_utf_8_is_stored_in_the_summary(tmp_path):
    Output(summary=str(tmp_path / "table.md"), as_json=False, out=None).store("model '\udcff'")
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == "model '?'"


def test_ctrl_c_in_a_turn_ends_both_sides(call, commit, monkeypatch, temporary, tmp_path, is_gone):
    commit("FAULT = {}", "first")
    cases = tmp_path / "cases"
    cases.mkdir()
    monkeypatch.setenv("GATE_CASES", str(cases))
    monkeypatch.setenv("GATE_PID", str(os.getpid()))
    before = set(psutil.Process().children(recursive=True))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupting = (*CASES, "--option", "data.prompt_field=interrupts", "--step", "mine:unused")
        assert call("gate", "--base", "HEAD", *interrupting)[0] == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    pids = [int(path.name) for path in cases.iterdir()]
    assert len(pids) == 2
    assert all(is_gone(pid) for pid in pids)
    assert set(psutil.Process().children(recursive=True)) <= before
    assert left_in(temporary) == []


def test_a_working_tree_that_is_edited_meanwhile_gives_no_answer(call, commit, monkeypatch):
    commit("FAULT = {}", "first")
    commit(LARGER, "second")

    def edits(self, fault=None):
        os.utime("mine.py", ns=(0, 0))
        return []

    monkeypatch.setattr(compare.Comparison, "run", edits)
    code, said, err = call("gate", "--base", "HEAD~1", *REVISION)
    assert (code, said) == (2, "")
    assert err.startswith("'mine.py' was edited while the gate ran")


def test_compare_with_takes_a_revision_or_a_run(call, commit, fake, tmp_path):
    commit("FAULT = {}", "first")
    commit(LARGER, "second")
    case = Case(
        method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=1,
        options=Options.of({"data.prompt_field": "revision"}),
    )  # fmt: skip
    sweep, lines, short = Sweep(cases=(case,)), [], git("rev-parse", "--short", "HEAD")
    options = GateOptions(step="mine:unused")
    itself = rlhfbench.gate.compare_in_words("HEAD", sweep, tmp_path / "itself", options)
    assert itself.note == "Base and head are the same commit: there was no change to judge."
    found, *words = rlhfbench.gate.compare_in_words("HEAD~1", sweep, tmp_path / "out", options, lines.append)
    assert words == [f"HEAD~1 ({git('rev-parse', '--short', 'HEAD~1')})", f"the working tree at {short}", ""]
    assert [finding.quantity for finding in found if finding.is_regression] == ["memory total"]
    assert lines == ["4 pairs: 0 of 1 cases are ambiguous"]
    steady = (*CASES, "--option", "data.prompt_field=steady")
    assert call("run", *steady, "--blocks", "2", "--out", str(tmp_path / "stored"))[0] == 0
    found = rlhfbench.gate.compare_with(str(tmp_path / "stored"), sweep, tmp_path / "new")
    assert {finding.verdict for finding in found} == {"same"}
    for base in ("HEAD~1", str(tmp_path / "stored")):
        with pytest.raises(GateError, match="it must be a new or an empty folder"):
            rlhfbench.gate.compare_with(base, sweep, tmp_path / "out", options)
