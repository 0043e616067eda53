"""The plans that ``plan --out`` writes, read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhfbench.errors import RecordsError
from rlhfbench.records.plans import PLAN_NAME, read_plans


def test_plans_are_read_as_they_were_written(tmp_path: Path) -> None:
    plans = [{"case": {"id": "a"}, "memory": {"total_bytes": 3}}]
    (tmp_path / PLAN_NAME).write_text(json.dumps(plans))
    assert read_plans(tmp_path) == plans


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "cannot be read: "),
        ("{}", "holds no plans: it must be a file of plan --out."),
        ("[3]", "holds no plans: it must be a file of plan --out."),
        ('[{"case": {}}]', "holds no plan: case.id is None: it must be letters, digits, _ and -."),
        ("[" * 100_000, "cannot be read: "),
        ('[{"case": {"id": "a", "batch_size": "four"}}]', "holds no plan: case.batch_size is 'four': it must be"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / PLAN_NAME).write_text(text)
    with pytest.raises(RecordsError) as caught:
        read_plans(tmp_path)
    assert problem in str(caught.value)


def test_a_folder_without_a_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match="No such file"):
        read_plans(tmp_path)
