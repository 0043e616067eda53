"""Comparisons of fake cases: what is timed, and when."""

from __future__ import annotations

import dataclasses

import psutil
import pytest

from rlhfbench.cases.sweep import Sweep
from rlhfbench.gate import compare
from rlhfbench.gate.compare import Comparison, GateOptions
from rlhfbench.gate.decide import MIN_PAIRS, SIGNIFICANCE, estimate
from rlhfbench.gate.findings import Finding
from rlhfbench.gate.output import exit_code
from rlhfbench.gate.selftest import slower_phase
from rlhfbench.gate.sides import Side
from rlhfbench.measure import turns
from rlhfbench.records.file import read_records
from rlhfbench.runs.forkserver import ForkServer
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options

CASE = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=2)
NUM_ROUNDS = 20
BASE, HEAD = Side(name="base", title="abc"), Side(name="head", title="the working tree")
pytestmark = pytest.mark.usefixtures("servers")


def test_equal_sides_are_the_same_after_the_first_look(tmp_path, compared, verdicts):
    findings, lines = compared(tmp_path, "steady")
    assert set(verdicts(findings).values()) == {"same"}
    assert exit_code(findings) == 0
    assert lines == [f"{MIN_PAIRS} pairs: 0 of 1 cases are ambiguous"]
    for name in ("base", "head"):
        (record,) = read_records(tmp_path / "out" / name)
        blocks = record["latency"]["blocks"]
        assert [block["in_turns"] for block in blocks] == [False] + [True] * MIN_PAIRS
        assert {len(block["phases"]["generate"]) for block in blocks[1:]} == {NUM_ROUNDS}


def test_the_last_look_spends_all_of_the_significance_level(tmp_path, monkeypatch, compared):
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
def test_servers_that_are_due_are_started_anew(tmp_path, monkeypatch, due, compared, verdicts):
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


def test_both_sides_of_every_pair_share_the_cores_that_a_case_needs(tmp_path, monkeypatch, compared):
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


def test_an_older_base_is_timed_in_blocks_one_after_the_other(tmp_path, sweep_of):
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


def test_a_slower_phase_is_found_in_the_phase_its_kind_and_the_total(tmp_path, compared, verdicts):
    findings, _ = compared(tmp_path, "steady", injected={"phase": "generate", "share": 0.5})
    said = verdicts(findings)
    assert {name for name, verdict in said.items() if verdict == "slower"} == {"total s", "inference s", "generate s"}
    assert said["optimize s"] == said["update s"] == "same"
    assert exit_code(findings) == 1
    (total,) = [found for found in findings if found.quantity == "generate s"]
    assert total.estimate.ratio == pytest.approx(1.5)


def test_a_fault_is_put_into_the_cases_that_it_names_alone(tmp_path, sweep_of):
    (case,) = sweep_of("steady").absolute().cases
    sweep = Sweep(cases=(case, dataclasses.replace(case, seed=1)))
    fault = slower_phase({case.id: "generate"}, 0.5)
    findings = Comparison(BASE, HEAD, sweep, tmp_path / "out", GateOptions()).run(fault)
    assert {found.case.seed for found in findings if found.verdict == "slower"} == {0}
    assert {found.verdict for found in findings if found.case.seed == 1} == {"same"}


def test_memory_that_grew_is_found_whatever_the_times(tmp_path, compared, verdicts):
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


def test_noise_is_looked_at_again_until_the_time_is_spent(tmp_path, compared):
    findings, lines = compared(tmp_path, "noisy", injected={})
    assert exit_code(findings) == 3
    assert len(lines) == compare.MAX_LOOKS
    assert len(compared(tmp_path / "short", "noisy", injected={}, budget_s=1e-9)[1]) == 1


def test_more_pairs_are_timed_for_times_that_are_ambiguous_alone(tmp_path, sweep_of):
    sweep = sweep_of("steady")
    comparison = Comparison(BASE, HEAD, sweep, tmp_path, GateOptions())
    # A user's phase may be called so.
    found = Finding(case=sweep.cases[0], quantity="memory bank s", verdict="ambiguous")
    assert comparison._undecided([found]) == list(sweep.cases)
    assert comparison._undecided([dataclasses.replace(found, is_memory=True)]) == []


@pytest.mark.parametrize(
    ("kind", "code", "reason"),
    [
        ("head-crashes", 1, "head: crashed"),  # the base measured it: a regression
        ("head-crashes-later", 1, "head: crashed"),  # in its second block
        ("base-crashes", 3, "base: crashed"),  # no pass, and no fault of the head
        ("segfault", 3, "base: crashed"),  # both alike
    ],
)
def test_a_case_that_fails_on_a_side_is_no_pass(tmp_path, kind, code, reason, compared):
    findings, _ = compared(tmp_path, kind, "steady", injected={"held_bytes": 0})
    failed, *sizes = [found for found in findings if found.case.options.data.prompt_field == kind]
    assert failed.verdict == "failed"
    assert failed.reason.startswith(reason)
    assert exit_code(findings) == code
    # What both sides have measured is compared.
    assert {found.quantity for found in sizes} == ({"memory total", *AT_PEAK} if kind.endswith("later") else set())


AT_PEAK = {"memory model", "memory activation", "memory rollout"}


@pytest.mark.parametrize(("broken", "code", "reason"), [("head", 1, "head: "), ("base", 3, "base: ")])
def test_a_side_that_does_not_start_fails_every_case(tmp_path, monkeypatch, broken, code, reason, sweep_of):
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


def test_a_model_may_be_named_by_a_path_from_the_working_folder(tmp_path, monkeypatch, sweep_of):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    sweep = Sweep(cases=tuple(dataclasses.replace(case, model="mine") for case in sweep_of("steady").cases))
    comparison = Comparison(BASE, HEAD, sweep, tmp_path / "out", GateOptions(step="mine:unused"))
    assert {found.case.model for found in comparison.run()} == {str(tmp_path / "mine")}
    assert list(comparison.spent_s.values()) > [0.0]
