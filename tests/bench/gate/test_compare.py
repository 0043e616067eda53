"""Comparisons of fake cases: what is timed, and what is found."""

from __future__ import annotations

import dataclasses
import json
import shutil

import psutil
import pytest

from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import GateError
from rlhfbench.gate import baseline, compare
from rlhfbench.gate.baseline import baseline_findings, baseline_sweep, time_obstacle, update_baseline
from rlhfbench.gate.bisect import bisect
from rlhfbench.gate.compare import Comparison, GateOptions
from rlhfbench.gate.decide import MIN_PAIRS, SIGNIFICANCE, Effects, estimate
from rlhfbench.gate.findings import Finding, findings_of, sizes_of
from rlhfbench.gate.output import exit_code, markdown, to_json
from rlhfbench.gate.pairs import BlockPair, LogRatio
from rlhfbench.gate.selftest import slower_phase
from rlhfbench.gate.sides import Side
from rlhfbench.gate.simulation import MeasuredCase, measured_cases, rates
from rlhfbench.measure import turns
from rlhfbench.records.file import read_records
from rlhfbench.runs.forkserver import ForkServer
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.progress import Silent
from rlhfbench.runs.runner import run_sweep
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options

CASE = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=2)
NUM_ROUNDS = 20
BASE, HEAD = Side(name="base", title="abc"), Side(name="head", title="the working tree")


@pytest.fixture(autouse=True)
def servers(monkeypatch, fake_server):
    """Sides fork fake cases, whose steps take no time: few rounds are as good as many."""
    monkeypatch.setattr(turns, "_MAX_ROUNDS", NUM_ROUNDS)
    monkeypatch.setattr(
        compare, "ForkServer", lambda paths, optional: ForkServer(target="fake_case:run_case", preload=())
    )


def sweep_of(*kinds):
    options = [Options.of({"data.prompt_field": kind}) for kind in kinds]
    return Sweep(cases=tuple(dataclasses.replace(CASE, options=option) for option in options))


def compared(tmp_path, *kinds, injected=None, **options):
    lines = []
    comparison = Comparison(BASE, HEAD, sweep_of(*kinds), tmp_path / "out", GateOptions(**options), lines.append)
    return comparison.run(None if injected is None else lambda case: injected), lines


def verdicts(findings):
    return {found.quantity: found.verdict for found in findings}


def test_equal_sides_are_the_same_after_the_first_look(tmp_path):
    findings, lines = compared(tmp_path, "steady")
    assert set(verdicts(findings).values()) == {"same"}
    assert exit_code(findings) == 0
    assert lines == [f"{MIN_PAIRS} pairs: 0 of 1 cases are ambiguous"]
    for name in ("base", "head"):
        (record,) = read_records(tmp_path / "out" / name)
        blocks = record["latency"]["blocks"]
        assert [block["in_turns"] for block in blocks] == [False] + [True] * MIN_PAIRS
        assert {len(block["phases"]["generate"]) for block in blocks[1:]} == {NUM_ROUNDS}


def test_the_last_look_spends_all_of_the_significance_level(tmp_path, monkeypatch):
    """Also where the case that took longest was decided before: the others are judged at what is left."""
    levels = []

    def judged(cases, base, head, effects, level):
        levels.append(level)
        return [
            Finding(case=case, quantity="total s", verdict="same" if case is cases[0] else "ambiguous")
            for case in cases
        ]

    monkeypatch.setattr(compare, "findings_of", judged)
    monkeypatch.setattr(Comparison, "_undecided", lambda self, findings: [])
    compared(tmp_path, "steady", "blocks", pair_s=0.01)
    assert sum(levels) == pytest.approx(SIGNIFICANCE)
    assert 0 < levels[0] < 0.001


@pytest.mark.parametrize("due", [True, False])
def test_servers_that_are_due_are_started_anew(tmp_path, monkeypatch, due):
    pids, time_pairs = [], Comparison._time_pairs

    def noted(self, both, *rest):
        pids.append([timed._server.pid for timed in both])
        time_pairs(self, both, *rest)

    monkeypatch.setattr(Comparison, "_time_pairs", noted)
    monkeypatch.setattr(compare, "are_due", lambda lived_s, start_s: due)
    findings, _ = compared(tmp_path, "steady", pair_s=0.01)
    assert set(verdicts(findings).values()) == {"same"}
    assert len({pid for both in pids for pid in both}) == 2 * (MIN_PAIRS if due else 1)


def test_servers_live_as_long_as_they_took_to_start():
    assert compare.are_due(4.5, 4.0)
    assert not compare.are_due(1.0, 4.0)


def test_both_sides_of_every_pair_share_the_cores_that_a_case_needs(tmp_path, monkeypatch):
    numbers = []
    monkeypatch.setattr(turns, "draw_cores", lambda number, rng: numbers.append(number))
    monkeypatch.setattr(compare, "shared_cores", lambda case, records: 3)
    compared(tmp_path, "steady")
    assert numbers == [3] * MIN_PAIRS


@pytest.mark.parametrize(
    ("world", "threads", "cores"), [(1, (1, 2), 2), (1, (1, None), None), (1, (None, None), None), (2, (1, 1), None)]
)
def test_a_case_needs_a_core_for_each_thread_where_that_is_known_of_all_its_processes(world, threads, cores):
    options = Options.of({"parallel.strategy": "ddp", "parallel.world_size": 2} if world == 2 else {})
    records = [{"num_threads": number} for number in threads]
    assert compare.shared_cores(dataclasses.replace(CASE, options=options), records) == cores


def test_an_older_base_is_timed_in_blocks_one_after_the_other(tmp_path):
    (tmp_path / "old" / "rlhfbench").mkdir(parents=True)
    (tmp_path / "old" / "rlhfbench" / "__init__.py").write_text("")
    old = dataclasses.replace(BASE, paths=(str(tmp_path / "old"),))
    assert not old.takes_turns
    (tmp_path / "old" / "rlhfbench" / "measure").mkdir()
    (tmp_path / "old" / "rlhfbench" / "measure" / "turns.py").touch()
    assert old.takes_turns
    assert "from before there was a gate" in str(old.obstacle)
    (tmp_path / "old" / "rlhfbench" / "measure" / "injection.py").touch()
    assert old.obstacle is BASE.obstacle is None
    assert dataclasses.replace(BASE, paths=(str(tmp_path),)).takes_turns  # a project of the user's

    class Older(Side):
        takes_turns = False

    Comparison(Older(name="base", title="old"), HEAD, sweep_of("steady"), tmp_path / "out", GateOptions()).run()
    for name in ("base", "head"):
        (record,) = read_records(tmp_path / "out" / name)
        assert not any(block["in_turns"] for block in record["latency"]["blocks"])


def test_a_pair_is_timed_for_a_twentieth_of_the_budget_at_most_three_seconds():
    budgets = (60.0, 600.0, 20.0)
    assert [GateOptions(budget_s=budget_s).turns_s for budget_s in budgets] == [3.0, 3.0, 1.0]
    assert GateOptions(budget_s=30.0, pair_s=3.0).turns_s == 3.0


@pytest.mark.parametrize(
    ("physical", "usable", "set_by_user", "threads"),
    [
        (2, 2, None, 1),
        (8, 16, None, 8),
        (8, 8, None, 7),
        (16, 4, None, 3),
        (1, 1, None, 1),
        (None, 4, None, 1),
        (8, 8, "4", None),
    ],
)
def test_one_core_is_left_to_the_rest_of_the_machine(monkeypatch, physical, usable, set_by_user, threads):
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: physical)
    monkeypatch.setattr(compare, "num_cores", lambda: usable)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_by_user is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", set_by_user)
    assert compare.default_threads() == threads


def test_both_sides_live_at_once_only_where_they_fit(monkeypatch):
    def records(num_bytes):
        return [{"memory": {"views": {"host_peak_bytes": num_bytes}}}] * 2

    monkeypatch.setattr(compare, "available_bytes", lambda: 1000)  # also of a control group
    assert compare.fit_at_once(CASE, records(340))
    assert not compare.fit_at_once(CASE, records(360))
    ranks = dataclasses.replace(CASE, options=Options.of({"parallel.strategy": "ddp", "parallel.world_size": 2}))
    assert compare.fit_at_once(ranks, records(170))
    assert not compare.fit_at_once(ranks, records(180))  # of each rank
    assert not compare.fit_at_once(dataclasses.replace(CASE, device="cuda"), records(1))
    assert not compare.fit_at_once(CASE, [*records(1)[:1], *records(None)[:1]])
    assert not compare.fit_at_once(CASE, [*records(1)[:1], None])


def test_a_slower_phase_is_found_in_the_phase_its_kind_and_the_total(tmp_path):
    findings, _ = compared(tmp_path, "steady", injected={"phase": "generate", "share": 0.5})
    said = verdicts(findings)
    assert {name for name, verdict in said.items() if verdict == "slower"} == {"total s", "inference s", "generate s"}
    assert said["optimize s"] == said["update s"] == "same"
    assert exit_code(findings) == 1
    (total,) = [found for found in findings if found.quantity == "generate s"]
    assert total.estimate.ratio == pytest.approx(1.5)


def test_a_fault_is_put_into_the_cases_that_it_names_alone(tmp_path):
    (case,) = sweep_of("steady").absolute().cases
    sweep = Sweep(cases=(case, dataclasses.replace(case, seed=1)))
    fault = slower_phase({case.id: "generate"}, 0.5)
    findings = Comparison(BASE, HEAD, sweep, tmp_path / "out", GateOptions()).run(fault)
    assert {found.case.seed for found in findings if found.verdict == "slower"} == {0}
    assert {found.verdict for found in findings if found.case.seed == 1} == {"same"}


def test_memory_that_grew_is_found_whatever_the_times(tmp_path):
    findings, _ = compared(tmp_path, "steady", injected={"held_bytes": 1})
    said = verdicts(findings)
    assert {name for name, verdict in said.items() if verdict == "larger"} == {"memory total"}
    assert exit_code(findings) == 1


def test_a_change_that_was_found_stands_whatever_later_looks_allow():
    """A later look without new pairs of a case has a smaller level: it takes nothing back."""
    slower = Finding(
        case=CASE, quantity="total s", verdict="slower", estimates=[estimate([0.1, 0.11])], is_regression=True
    )
    weaker = dataclasses.replace(slower, verdict="ambiguous", is_regression=False)
    other = dataclasses.replace(weaker, quantity="generate s", verdict="same")
    kept = compare._with_changes_of([slower, other], [weaker, dataclasses.replace(other, verdict="ambiguous")])
    assert [found.verdict for found in kept] == ["slower", "ambiguous"]
    failed = Finding(case=CASE, quantity="", verdict="failed")
    assert compare._with_changes_of([slower, other], [failed]) == [failed, slower]


def test_noise_is_looked_at_again_until_the_time_is_spent(tmp_path):
    findings, lines = compared(tmp_path, "noisy", injected={})
    assert exit_code(findings) == 3
    assert len(lines) == compare.MAX_LOOKS
    assert len(compared(tmp_path / "short", "noisy", injected={}, budget_s=1e-9)[1]) == 1


@pytest.mark.parametrize(
    ("kind", "code", "reason"),
    [
        ("head-crashes", 1, "head: crashed"),  # the base measured it: a regression
        ("head-crashes-later", 1, "head: crashed"),  # in its second block
        ("base-crashes", 3, "base: crashed"),  # no pass, and no fault of the head
        ("segfault", 3, "base: crashed"),  # both alike
    ],
)
def test_a_case_that_fails_on_a_side_is_no_pass(tmp_path, kind, code, reason):
    findings, _ = compared(tmp_path, kind, "steady", injected={"held_bytes": 0})
    failed, *sizes = [found for found in findings if found.case.options.data.prompt_field == kind]
    assert failed.verdict == "failed"
    assert failed.reason.startswith(reason)
    assert exit_code(findings) == code
    # What both sides have measured is compared.
    assert {found.quantity for found in sizes} == ({"memory total", *AT_PEAK} if kind.endswith("later") else set())


AT_PEAK = {"memory model", "memory activation", "memory rollout"}


@pytest.mark.parametrize(("broken", "code", "reason"), [("head", 1, "head: "), ("base", 3, "base: ")])
def test_a_side_that_does_not_start_fails_every_case(tmp_path, monkeypatch, broken, code, reason):
    monkeypatch.setattr(
        compare,
        "ForkServer",
        lambda paths, optional: ForkServer(target="fake_case:run_case", preload=paths),
    )
    sides = [dataclasses.replace(side, paths=("no_such_module",) * (side.name == broken)) for side in (BASE, HEAD)]
    sweep = sweep_of("steady", "noisy")
    findings = Comparison(*sides, sweep, tmp_path / "out", GateOptions()).run()
    assert [(found.case, found.verdict) for found in findings] == [(case, "failed") for case in sweep.cases]
    assert findings[0].reason.startswith(f"{reason}the fork server did not start: ")
    assert exit_code(findings) == code


def test_a_model_may_be_named_by_a_path_from_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    sweep = Sweep(cases=tuple(dataclasses.replace(case, model="mine") for case in sweep_of("steady").cases))
    comparison = Comparison(BASE, HEAD, sweep, tmp_path / "out", GateOptions(step="mine:unused"))
    assert {found.case.model for found in comparison.run()} == {str(tmp_path / "mine")}
    assert list(comparison.spent_s.values()) > [0.0]


def record_of(generate_s, score_s, *, num_blocks=MIN_PAIRS, **more):
    """A record of two phases whose blocks after the first have these steps."""
    block = {"phases": {"generate": generate_s, "score": score_s}, "in_turns": True, "error": None}
    kinds = {"generate": {"kind": "inference"}, "score": {"kind": "inference"}}
    blocks = [block] * (num_blocks + 1)
    latency = {"phases": kinds, "blocks": blocks, "total_block_s_per_sample": [1.0] * len(blocks)}
    return {"case": {"batch_size": 1}, "outcome": "ok", "error": None, "latency": latency, "num_threads": 1, **more}


@pytest.mark.parametrize(
    ("base", "head", "verdict", "reason"),
    [
        ([1.0, 0.0, 1.0, 0.0], [1.5, 0.0, 1.5, 0.0], "slower", None),  # every second step enters the phase
        ([0.0] * 4, [0.0] * 4, "same", None),  # declared, and never entered
        ([0.0] * 4, [1.0] * 4, "ambiguous", "it took no time in some pairs."),
    ],
)
def test_a_phase_that_takes_no_time_in_some_steps_is_not_left_out(base, head, verdict, reason):
    records = [{CASE.id: record_of([1.0] * 4, steps)} for steps in (base, head)]
    findings = {found.quantity: found for found in findings_of([CASE], *records, Effects(), 0.05)}
    assert (findings["score s"].verdict, findings["score s"].reason) == (verdict, reason)


def test_a_quantity_that_one_side_alone_has_is_missing(tmp_path):
    findings, _ = compared(tmp_path, "renames-a-phase", injected={"held_bytes": 0})
    missing = {found.quantity: found.is_regression for found in findings if found.verdict == "missing"}
    assert missing == {"optimize s": True, "learn s": False}
    assert exit_code(findings) == 1


def test_parts_are_compared_where_both_sides_peak_in_one_phase(tmp_path):
    """A head whose total is smaller and peaks elsewhere has other parts at its peak: that is no regression."""

    def record(peak, total, cache):
        phases = {"generate": {"total_bytes": 50}, "update": {"total_bytes": total}}
        parts = {"kv_cache": cache, "activations": total - cache}
        return {"memory": {"total_bytes": total, "peak_phase": peak, "parts": parts, "phases": phases}}

    found = {f.quantity: f.verdict for f in sizes_of(CASE, record("update", 100, 0), record("generate", 50, 40))}
    assert found == {"memory total": "smaller", "memory generate": "same", "memory update": "smaller"}
    same = {f.quantity: f.verdict for f in sizes_of(CASE, record("update", 100, 0), record("update", 100, 40))}
    assert same["memory part kv_cache"] == "larger"


def test_a_phase_that_is_called_as_a_part_has_a_name_of_its_own():
    record = {"memory": {"total_bytes": 9, "phases": {"rollout": {"total_bytes": 7}}, "rollout_bytes": 2}}
    found = {f.quantity: f.base for f in sizes_of(CASE, record, record)}
    assert (found["memory phase rollout"], found["memory rollout"]) == (7, 2)


def test_the_table_has_the_answer_the_totals_and_what_differs(tmp_path):
    findings, _ = compared(tmp_path, "steady", injected={"phase": "generate", "share": 0.5})
    table = markdown(findings, "abc", "the working tree")
    assert table.startswith("**Regression: 3 quantities.** the working tree against abc.")
    assert "| generate s |" in table
    assert "| optimize s |" not in table
    assert "1.500 (1.500 to 1.500) | slower |" in table
    written = json.loads(json.dumps(to_json(findings, base="abc", head="tree")))
    assert (written["exit_code"], written["base"]) == (1, "abc")
    assert len(written["findings"]) == len(findings)


def test_text_in_a_table_breaks_no_row():
    found = Finding(case=CASE, quantity="", verdict="failed", reason="head: crashed: a | b\nc")
    assert "failed: head: crashed: a \\| b c |" in markdown([found], "x", "y")
    assert "**Cannot tell.**" in markdown([], "x", "y")


def test_a_users_phase_may_be_called_memory():
    seconds = Finding(case=CASE, quantity="memory bank s", verdict="ambiguous", base=0.5, head=0.25)
    size = Finding(case=CASE, quantity="memory total", verdict="same", base=2**20, head=2**20)
    table = markdown([seconds, size], "x", "y")
    assert "| 0.5 s | 0.25 s |" in table
    assert "| 1.000 MiB | 1.000 MiB |" in table
    assert exit_code([]) == 3


COMMITS = [f"c{number}" for number in range(8)]


@pytest.mark.parametrize("culprit", [0, 3, 7])
def test_bisect_finds_the_first_bad_commit(culprit):
    lines, asked = [], []

    def compare_commit(commit):
        asked.append(commit)
        verdict = "larger" if COMMITS.index(commit) >= culprit else "same"
        return [Finding(case=CASE, quantity="memory total", verdict=verdict, is_regression=verdict == "larger")]

    found = bisect(COMMITS, compare_commit, lambda commit: f"subject of {commit}", lines.append)
    assert found.commit == COMMITS[culprit]
    assert len(asked) == len(set(asked)) <= 4
    assert lines[0] == "c7 bad: subject of c7"


def test_a_bisect_shows_the_ratio_that_it_judges_by():
    def compare_commit(commit):
        memory = Finding(case=CASE, quantity="memory total", verdict="larger", base=100, head=101, is_regression=True)
        noise = Finding(case=CASE, quantity="total s", verdict="same", estimates=[estimate([0.04, 0.041])])
        slower = dataclasses.replace(noise, quantity="update s", verdict="slower", is_regression=True)
        in_noise = dataclasses.replace(slower, verdict="ambiguous", is_regression=False)
        return [noise, memory, slower if commit == "c2" else in_noise]

    lines = []
    bisect(["c1", "c2"], compare_commit, lambda commit: f"subject of {commit}", lines.append)
    assert lines == [
        "c2 bad (update s: 1.041 (1.035 to 1.048)): subject of c2",
        "c1 bad (memory total: 1.0100): subject of c1",
    ]


@pytest.mark.parametrize(("verdict", "is_clear"), [("same", True), ("ambiguous", False)])
def test_bisect_without_a_regression_returns_the_last_commit(verdict, is_clear):
    found = [Finding(case=CASE, quantity="memory total", verdict=verdict)]
    last = bisect(COMMITS, lambda commit: found, str, lambda line: None)
    assert (last.commit, last.is_clear, last.regressions) == ("c7", is_clear, set())


@pytest.mark.parametrize(("quantity", "verdict"), [("", "failed"), ("memory total", "ambiguous")])
def test_bisect_names_commits_that_could_not_be_judged(quantity, verdict):
    """A commit that crashed has a regression, and no answer to what is looked for; nor has one without findings."""
    lines = []

    def compare_commit(commit):
        if commit == "c5":
            return []
        if commit == "c3":
            return [Finding(case=CASE, quantity=quantity, verdict=verdict, is_regression=verdict == "failed")]
        return [Finding(case=CASE, quantity="memory total", verdict="larger", is_regression=True)]

    found = bisect(COMMITS, compare_commit, str, lines.append)
    assert (found.commit, found.unjudged) == ("c6", ["c3", "c5"])
    assert [line.split(":")[0] for line in lines] == ["c7 bad", "c3 cannot tell", "c5 cannot tell", "c6 bad"]
    assert found.note.endswith("were taken as good; one may be the first bad one: c3, c5.")


def test_bisect_cannot_judge_a_commit_whose_base_failed_too_where_the_head_fails():
    """A crash of both sides says nothing of a case that crashes at the bad end."""

    def compare_commit(commit):
        if commit == "c1":
            return [Finding(case=CASE, quantity="memory total", verdict="same")]
        return [Finding(case=CASE, quantity="", verdict="failed", is_regression=commit >= "c5")]

    found = bisect(COMMITS, compare_commit, str, lambda line: None)
    assert (found.commit, found.unjudged) == ("c5", ["c3", "c4"])
    good = dataclasses.replace(found, findings=compare_commit("c1"))
    assert good.judged(found.regressions) == "good"


def test_bisect_takes_a_commit_with_another_regression_as_good():
    def compare_commit(commit):
        mended = {"total s": "slower", "memory total": "same"}
        said = mended if commit != "c7" else {"total s": "same", "memory total": "larger"}
        return [
            Finding(case=CASE, quantity=name, verdict=verdict, is_regression=verdict != "same")
            for name, verdict in said.items()
        ]

    assert bisect(COMMITS, compare_commit, str, lambda line: None).commit == "c7"


def stored(folder, *kinds, blocks=3):
    run_sweep(sweep_of(*kinds), folder, RunOptions(blocks=blocks), progress=Silent())


def test_a_baseline_judges_memory_and_on_the_same_machine_time(tmp_path):
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


def test_a_baseline_of_one_block_judges_no_times_and_says_so(tmp_path):
    for name, blocks in (("old", 1), ("new", 3)):
        stored(tmp_path / name, "steady", blocks=blocks)
    findings = baseline_findings(tmp_path / "old", tmp_path / "new", Effects(), times_obstacle=None)
    assert [found.reason for found in findings if found.verdict == "ambiguous"] == ["a side has fewer than two blocks."]
    assert exit_code(findings) == 3


def test_a_case_that_the_new_run_lacks_is_missing(tmp_path):
    stored(tmp_path / "old", "steady", "blocks")
    stored(tmp_path / "new", "steady")
    findings = baseline_findings(tmp_path / "old", tmp_path / "new", Effects(), times_obstacle=None)
    assert [found.reason for found in findings if found.verdict == "missing"] == ["head: there is no record of it."]
    assert exit_code(findings) == 1


def test_times_of_another_machine_are_not_judged(tmp_path):
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


def test_a_phase_of_one_run_alone_is_missing_and_a_constant_of_both_is_the_same(tmp_path):
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


def test_a_baseline_is_run_again_with_its_threads_and_times_of_others_are_not_judged(tmp_path):
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


def test_a_baseline_that_is_replaced_never_has_old_records_beside_a_new_environment(tmp_path, monkeypatch):
    for name in ("old", "new"):
        stored(tmp_path / name, "steady")
    seen = []
    monkeypatch.setattr(baseline, "write_atomically", lambda path, text: seen.append((path.name, is_there())))

    def is_there():
        return (tmp_path / "old" / "records.jsonl").exists()

    update_baseline(tmp_path / "new", tmp_path / "old")
    assert seen == [("sweep.toml", False), ("environment.json", False), ("records.jsonl", False)]


def test_a_baseline_is_replaced_by_what_the_gate_reads(tmp_path):
    stored(tmp_path / "new", "steady")
    update_baseline(tmp_path / "new", tmp_path / "base")
    assert read_records(tmp_path / "base") == read_records(tmp_path / "new")
    assert baseline_sweep(tmp_path / "base") == baseline_sweep(tmp_path / "new")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").write_text("")
    with pytest.raises(GateError, match="holds files of something else"):
        update_baseline(tmp_path / "new", tmp_path / "else")


def test_nothing_of_the_old_run_stays_beside_the_records_of_a_baseline_that_is_replaced(tmp_path):
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


def test_a_baseline_without_a_run_or_records_is_one_sentence(tmp_path):
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
def test_a_baseline_that_cannot_be_read_is_one_sentence(tmp_path, name, content, says):
    stored(tmp_path / "run", "steady")
    path = tmp_path / "run" / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(GateError, match=f"^baseline '.*run' {says}"):
        baseline_sweep(tmp_path / "run")


def test_simulated_rates_follow_the_noise(tmp_path):
    compared(tmp_path, "steady", "blocks")
    ids = [case.id for case in sweep_of("steady", "blocks").cases]
    cases = measured_cases(tmp_path / "out", dict.fromkeys(ids, 10.0))
    assert {case.longest_phase for case in cases} == {"generate"}
    steady = [case for case in cases if "optimize" in case.kinds]
    assert steady[0].affected("generate") == {"generate", "inference", "total"}
    assert [case.case_id for case in cases] == [record["case"]["id"] for record in read_records(tmp_path / "out/base")]
    quiet = rates(steady * 3, 0.2, Effects(), 60.0)
    assert (quiet.found, quiet.false_alarms, quiet.num_pairs) == (1.0, 0.0, MIN_PAIRS)
    assert quiet.others == {"pytest-benchmark's 10 % on means": (1.0, 0.0), "asv's factor 1.1": (1.0, 0.0)}
    still = rates(steady * 3, 0.0, Effects(), 60.0)
    assert {still.found, *still.others.values()} == {0.0, (0.0, 0.0)}
    names = ("think", "update", "total")
    equal = dict.fromkeys(names, 1.0)
    wild = [
        BlockPair(
            base=equal,
            head=equal,
            ratios=dict.fromkeys(names, (LogRatio(ratio, 0.0),)),
            disturbed=(False, False),
            steps=([equal], [equal]),
        )
        for ratio in (-1.2, -0.3, 0.7, 1.6)
    ]
    noisy = MeasuredCase(case_id="", kinds={"think": "update"}, pairs=wild, spent_s=5.0)
    patient = rates([noisy], 0.05, Effects(), 60.0)
    assert patient.ambiguous > 0.9
    # There is no other case.
    assert {patient.false_alarms, *(alarms for _, alarms in patient.others.values())} == {None}
    assert patient.case_s == pytest.approx(patient.num_pairs + 1)  # a pair takes a second, and memory another
    hasty = rates([noisy], 0.05, Effects(), 6.5)
    assert 5.5 < hasty.num_pairs <= MIN_PAIRS + 2  # then 7 of 6.5 seconds are spent; some tries end before
