"""The table of a comparison, and its JSON."""

from __future__ import annotations

import dataclasses
import json

from rlhfbench.gate.findings import Finding
from rlhfbench.gate.output import exit_code, markdown, to_json
from rlhfkernels.config.case import Case

CASE = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=2)


def test_the_table_has_the_answer_the_totals_and_what_differs(tmp_path, compared):
    findings, _ = compared(tmp_path, "steady", injected={"phase": "generate", "share": 0.5})
    table = markdown(findings, "abc", "the working tree")
    assert table.startswith("**Regression: 3 quantities.** the working tree against abc.")
    assert "| generate s |" in table
    assert "| optimize s |" not in table
    assert "1.500 (1.500 to 1.500) | slower |" in table
    written = json.loads(json.dumps(to_json(findings, base="abc", head="tree")))
    assert (written["exit_code"], written["base"]) == (1, "abc")
    assert len(written["findings"]) == len(findings)


def test_checkpoints_of_one_name_are_told_apart():
    cases = [dataclasses.replace(CASE, model=f"runs/{run}/checkpoint-500", dtype="bfloat16") for run in "ab"]
    table = markdown([Finding(case=case, quantity="memory total", verdict="same") for case in cases], "x", "y")
    assert "| hydra a/checkpoint-500 4+4 x2 bfloat16 |" in table
    assert "| hydra b/checkpoint-500 4+4 x2 bfloat16 |" in table


def test_text_in_a_table_breaks_no_row():
    found = Finding(case=CASE, quantity="", verdict="failed", reason="head: crashed: a | b\nc")
    assert "failed: head: crashed: a \\| b c |" in markdown([found], "x", "y")
    assert "**Cannot tell.**" in markdown([], "x", "y")


def test_a_users_phase_may_be_called_memory():
    seconds = Finding(case=CASE, quantity="memory bank s", verdict="ambiguous", base=0.5, head=0.25)
    size = Finding(case=CASE, quantity="memory total", verdict="same", base=2**20, head=2**20, is_memory=True)
    table = markdown([seconds, size], "x", "y")
    assert "| 0.5 s | 0.25 s |" in table
    assert "| 1.000 MiB | 1.000 MiB |" in table
    assert exit_code([]) == 3
