from __future__ import annotations

from typing import Any

import pytest

from rlhfbench.records.checks import fits, wrong_type
from rlhfbench.records.file import make_record
from rlhfkernels.config.case import Case

CASE = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=1)


@pytest.mark.parametrize("dtype", ["Int64", "Float64"])
def test_a_truth_value_is_no_number(dtype: str) -> None:
    assert fits(1, dtype)
    assert not fits(True, dtype)
    assert not fits([True], "list")


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("latency.sequences_per_sample", 0, "an integer of at least 1"),
        ("latency.sequences_per_sample", 2, None),
        ("case.options.parallel.world_size", -2, "an integer of at least 1"),
        ("case.options.parallel.world_size", "two", "an integer of at most 64 bits"),
        ("case.options.parallel.zero_stage", "two", "an integer of at most 64 bits"),
        ("case.options.parallel.zero_stage", 2, None),
    ],
)
def test_a_number_that_columns_are_computed_from_is_checked(path: str, value: Any, rule: str | None) -> None:
    measured = {"latency": {"total_s_per_sample": 1.0}}
    record = make_record(CASE, outcome="ok", error=None, measured=measured, started_at="2026-01-01", wall_s=1.0)
    *keys, last = path.split(".")
    node = record
    for key in keys:
        node = node[key]
    node[last] = value
    assert wrong_type(record) == (None if rule is None else f"{path} is {value!r}: it must be {rule}.")


def test_the_bytes_that_a_phase_writes_are_checked() -> None:
    record = {"case": {"id": "a"}, "work": {"phases": {"learn": {"written_bytes": "many"}}}}
    sentence = "work.phases.learn.written_bytes is 'many': it must be an integer of at most 64 bits."
    assert wrong_type(record) == sentence
