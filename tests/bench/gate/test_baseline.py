"""A stored run as the base, of fake cases."""

from __future__ import annotations

import json
import shutil

import pytest

from rlhfbench.errors import GateError
from rlhfbench.gate import baseline
from rlhfbench.gate.baseline import baseline_findings, baseline_sweep, time_obstacle, update_baseline
from rlhfbench.gate.decide import Effects
from rlhfbench.gate.output import exit_code
from rlhfbench.records.file import read_records
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.progress import Silent
from rlhfbench.runs.runner import run_sweep
from rlhfkernels.config.case import Case

CASE = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=2)


@pytest.fixture
def stored(servers, sweep_of):
    """Returns a function that stores a run of fake cases of these kinds in a folder."""

    def stored(folder, *kinds, blocks=3):
        run_sweep(sweep_of(*kinds), folder, RunOptions(blocks=blocks), progress=Silent())

    return stored


def test_a_baseline_judges_memory_and_on_the_same_machine_time(tmp_path, verdicts, stored):
    for name in ("old", "new"):
        stored(tmp_path / name, "steady")
    path = tmp_path / "old" / "environment.json"
    source = {"commit": "older", "dirty": False, "hash": "older"}  # the code is what is compared
    path.write_text(json.dumps({**json.loads(path.read_text()), "source": source}))
    assert time_obstacle(tmp_path / "old", tmp_path / "new") is None
    both = baseline_findings(tmp_path / "old", tmp_path / "new", Effects(), times_obstacle=None)
    assert verdicts(both)["generate s"] == "same"
    other = baseline_findings(tmp_path / "old", tmp_path / "new", Effects(), times_obstacle="another host.")
    assert {found.reason for found in other if found.verdict == "ambiguous"} == {"another host."}
    assert exit_code(other) == 3


def test_a_baseline_of_one_block_judges_no_times_and_says_so(tmp_path, stored):
    for name, blocks in (("old", 1), ("new", 3)):
        stored(tmp_path / name, "steady", blocks=blocks)
    findings = baseline_findings(tmp_path / "old", tmp_path / "new", Effects(), times_obstacle=None)
    assert [found.reason for found in findings if found.verdict == "ambiguous"] == ["a side has fewer than two blocks."]
    assert exit_code(findings) == 3


def test_a_case_that_the_new_run_lacks_is_missing(tmp_path, stored):
    stored(tmp_path / "old", "steady", "blocks")
    stored(tmp_path / "new", "steady")
    findings = baseline_findings(tmp_path / "old", tmp_path / "new", Effects(), times_obstacle=None)
    assert [found.reason for found in findings if found.verdict == "missing"] == ["head: there is no record of it."]
    assert exit_code(findings) == 1


def test_times_of_another_machine_are_not_judged(tmp_path, stored):
    for name in ("old", "new"):
        stored(tmp_path / name, "steady")
    path = tmp_path / "old" / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "host": "another"}))
    assert "instead of another" in time_obstacle(tmp_path / "old", tmp_path / "new")
    environment = json.loads((tmp_path / "new" / "environment.json").read_text())
    nodes = {"node-1": {**environment, "host": "one of a cluster"}}  # where Ray ran the cases
    path.write_text(json.dumps({**environment, "nodes": nodes}))
    assert "instead of one of a cluster" in time_obstacle(tmp_path / "old", tmp_path / "new")
    path.unlink()
    assert "is not recorded" in time_obstacle(tmp_path / "old", tmp_path / "new")


def test_a_phase_of_one_run_alone_is_missing_and_a_constant_of_both_is_the_same(tmp_path, verdicts, stored):
    """A time has no pairs between two runs."""
    for name, renamed, seconds in (("old", "score", 0.0), ("new", "judge", 0.0)):
        stored(tmp_path / name, "steady")
        (record,) = read_records(tmp_path / name)
        for block in record["latency"]["blocks"]:
            block["phases"] |= {renamed: [1.0], "idle": [seconds]}
        record["latency"]["phases"] |= {renamed: {"kind": "update"}, "idle": {"kind": "update"}}
        (tmp_path / name / "records.jsonl").write_text(json.dumps(record) + "\n")
    findings = baseline_findings(tmp_path / "old", tmp_path / "new", Effects(), times_obstacle=None)
    missing = {found.quantity: found.is_regression for found in findings if found.verdict == "missing"}
    assert missing == {"score s": True, "judge s": False}
    assert verdicts(findings)["idle s"] == "same"


def test_a_baseline_is_run_again_with_its_threads_and_times_of_others_are_not_judged(tmp_path, stored, record_of):
    def record(num_threads):
        return record_of([1.0], [1.0], num_threads=num_threads)

    (found,) = baseline._times(CASE, record(4), record(2), None)
    assert (found.verdict, found.reason) == ("ambiguous", "Times are not judged: 2 threads instead of 4.")
    stored(tmp_path, "steady", "noisy")
    assert baseline._threads(tmp_path) is None  # fakes say nothing of it
    records = [{**record, "num_threads": 3} for record in read_records(tmp_path)]
    for last, threads in ((3, 3), (None, 3), (4, None)):
        records[-1]["num_threads"] = last
        (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        assert baseline._threads(tmp_path) == threads


def test_a_baseline_that_is_replaced_never_has_old_records_beside_a_new_environment(tmp_path, monkeypatch, stored):
    for name in ("old", "new"):
        stored(tmp_path / name, "steady")
    seen = []
    monkeypatch.setattr(baseline, "write_atomically", lambda path, text: seen.append((path.name, is_there())))

    def is_there():
        return (tmp_path / "old" / "records.jsonl").exists()

    update_baseline(tmp_path / "new", tmp_path / "old")
    assert seen == [("sweep.toml", False), ("environment.json", False), ("records.jsonl", False)]


def test_a_baseline_is_replaced_by_what_the_gate_reads(tmp_path, stored):
    stored(tmp_path / "new", "steady")
    update_baseline(tmp_path / "new", tmp_path / "base")
    assert read_records(tmp_path / "base") == read_records(tmp_path / "new")
    assert baseline_sweep(tmp_path / "base") == baseline_sweep(tmp_path / "new")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").write_text("")
    with pytest.raises(GateError, match="holds files of something else"):
        update_baseline(tmp_path / "new", tmp_path / "else")


def test_nothing_of_the_old_run_stays_beside_the_records_of_a_baseline_that_is_replaced(tmp_path, stored):
    """A report would draw the timelines of the old run as those of the new one."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        stored(folder, "steady")
        (folder / "timelines").mkdir()
        (folder / "timelines" / "case.json").write_text(folder.name)
    for name in ("timelines/case.png", "timelines/other.json", "index.html", "latency.svg", "thesis.txt"):
        (old / name).write_text("")
    (old / "traces" / "case").mkdir()
    (new / "timelines" / "case.png").write_text("")
    update_baseline(new, old)
    left = {str(path.relative_to(old)) for path in old.rglob("*")}
    assert left == {
        *("sweep.toml", "environment.json", "records.jsonl"), *("timelines", "timelines/case.json", "thesis.txt"),
    }  # fmt: skip
    assert (old / "timelines" / "case.json").read_text() == "new"
    shutil.rmtree(new / "timelines")
    update_baseline(new, old)
    assert not (old / "timelines").exists()


def test_a_baseline_without_a_run_or_records_is_one_sentence(tmp_path, stored):
    with pytest.raises(GateError, match="holds no run"):
        baseline_sweep(tmp_path)
    stored(tmp_path / "run", "steady")
    (tmp_path / "run" / "records.jsonl").write_text("")
    with pytest.raises(GateError, match="holds no records"):
        baseline_sweep(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("sweep.toml", None, "has no sweep.toml: it cannot be run again."),
        ("sweep.toml", "methods = [", "cannot be compared with: .*sweep.toml"),
        ("sweep.toml", 'methods = ["gone"]', "cannot be compared with: .*gone"),
        ("records.jsonl", "{}\n", "cannot be compared with: records file .* line 1: it is not a record"),
        ("environment.json", "[", "cannot be compared with: .*environment.json' is not JSON"),
    ],
)
def test_a_baseline_that_cannot_be_read_is_one_sentence(tmp_path, name, content, says, stored):
    stored(tmp_path / "run", "steady")
    path = tmp_path / "run" / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(GateError, match=f"^baseline '.*run' {says}"):
        baseline_sweep(tmp_path / "run")
