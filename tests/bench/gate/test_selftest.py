"""The counts of the self-test."""

from __future__ import annotations

from rlhfbench.gate.findings import Finding
from rlhfbench.gate.selftest import found_and_open
from rlhfkernels.config.case import Case


def case_of(batch_size: int) -> Case:
    return Case(method="full", model="tiny", prompt_len=16, completion_len=16, batch_size=batch_size)


def test_a_slower_phase_is_found_in_the_times_that_it_is_part_of_and_a_found_case_is_not_open():
    found, elsewhere, is_open, unmeasured = map(case_of, (1, 2, 3, 4))
    findings = [
        Finding(case=found, quantity="generate s", verdict="slower"),
        Finding(case=found, quantity="total s", verdict="ambiguous"),
        Finding(case=elsewhere, quantity="optimize s", verdict="slower"),
        Finding(case=elsewhere, quantity="generate s", verdict="same"),
        Finding(case=is_open, quantity="generate s", verdict="ambiguous"),
        Finding(case=is_open, quantity="optimize s", verdict="slower"),
        Finding(case=unmeasured, quantity="generate s", verdict="slower"),
    ]
    affected = {case.id: {"generate s", "inference s", "total s"} for case in (found, elsewhere, is_open)}
    assert found_and_open(findings, affected) == (1, 1)
