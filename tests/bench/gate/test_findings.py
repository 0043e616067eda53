"""Findings from the records of two sides."""

from __future__ import annotations

import json

import pytest

from rlhfbench.gate.decide import Effects
from rlhfbench.gate.findings import findings_of, sizes_of
from rlhfbench.gate.output import exit_code
from rlhfkernels.config.case import Case

CASE = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=2)


@pytest.mark.parametrize(
    ("base", "head", "verdict", "reason"),
    [
        ([1.0, 0.0, 1.0, 0.0], [1.5, 0.0, 1.5, 0.0], "slower", None),  # every second step enters the phase
        ([0.0] * 4, [0.0] * 4, "same", None),  # declared, and never entered
        ([0.0] * 4, [1.0] * 4, "ambiguous", "it took no time in some pairs."),
    ],
)
def test_a_phase_that_takes_no_time_in_some_steps_is_not_left_out(record_of, base, head, verdict, reason):
    records = [{CASE.id: record_of([1.0] * 4, steps)} for steps in (base, head)]
    findings = {found.quantity: found for found in findings_of([CASE], *records, Effects(), 0.05)}
    assert (findings["score s"].verdict, findings["score s"].reason) == (verdict, reason)


def test_a_quantity_that_one_side_alone_has_is_missing(tmp_path, compared):
    findings, _ = compared(tmp_path, "renames-a-phase", injected={"held_bytes": 0})
    missing = {found.quantity: found.is_regression for found in findings if found.verdict == "missing"}
    assert missing == {"optimize s": True, "learn s": False}
    assert exit_code(findings) == 1


def test_bytes_are_told_from_seconds_whatever_a_phase_is_called(record_of):
    phases = ({"x s": {"total_bytes": 9}}, {})
    records = [record_of([1.0] * 4, [1.0] * 4, memory={"total_bytes": 9, "phases": each}) for each in phases]
    sides = [{CASE.id: json.loads(json.dumps(record).replace("score", "memory bank"))} for record in records]
    found = findings_of([CASE], *sides, Effects(), 0.05)
    assert {each.quantity: each.verdict for each in found if each.is_memory} == {
        "memory total": "same",
        "memory x s": "missing",
        **dict.fromkeys(["memory model", "memory activation", "memory rollout"], "ambiguous"),
    }
    assert "memory bank s" in {each.quantity for each in found}


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
