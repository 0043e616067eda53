"""Simulated comparisons from measured pairs."""

from __future__ import annotations

import pytest

from rlhfbench.gate.decide import MIN_PAIRS, Effects
from rlhfbench.gate.pairs import BlockPair, LogRatio
from rlhfbench.gate.simulation import MeasuredCase, measured_cases, rates
from rlhfbench.records.file import read_records


def test_simulated_rates_follow_the_noise(tmp_path, sweep_of, compared):
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
