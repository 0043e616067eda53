"""The script of the GitHub Action, with a stand-in for the command."""

from __future__ import annotations

import os
import subprocess
import textwrap
from pathlib import Path

import pytest

from rlhfbench.gate.findings import Finding
from rlhfbench.gate.output import markdown
from rlhfkernels.config.case import Case

CASE = Case(method="full", model="tiny", prompt_len=16, completion_len=16, batch_size=2)
ACTION = Path(__file__).parents[3] / "action.yml"
SCRIPT = textwrap.dedent(ACTION.read_text(encoding="utf-8").partition("      run: |\n")[2])
# Refuses a folder that exists, as the command does where it holds files; writes the table in $TABLE, if
# any; ends with the code in $CODE.
COMMAND = """#!/bin/bash
while [ $# -gt 0 ]; do
  case $1 in
    --out) mkdir "$2" || exit 2 ;;
    --summary) printf '%s\\n' "${TABLE:-table of $BASE}" > "$2" ;;
  esac
  shift
done
exit "$CODE"
"""


@pytest.fixture
def step(tmp_path, monkeypatch):
    """Returns a function that runs the action's script; it returns the exit code and the outputs."""
    command = tmp_path / "bin" / "rlhfbench"
    command.parent.mkdir()
    command.write_text(COMMAND)
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
    monkeypatch.setenv("RUNNER_TEMP", str(tmp_path))

    def run(base, code, allow="true", table="", folder=tmp_path, **variables):
        files = {f"GITHUB_{name}": str(tmp_path / name) for name in ("OUTPUT", "STEP_SUMMARY")}
        more = {"BASE": base, "CODE": str(code), "ARGUMENTS": "--methods lora", "ALLOW": allow, "TABLE": table}
        # As GitHub runs the shell bash.
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", SCRIPT],
            env={**os.environ, **more, **files, **variables},
            check=False,
            cwd=folder,
        )
        return done.returncode, dict(line.split("=", 1) for line in (tmp_path / "OUTPUT").read_text().splitlines())

    return run


def test_a_job_may_have_several_gates(step, tmp_path):
    first, second = step("abc", 0), step("def", 1)
    assert [code for code, _ in (first, second)] == [0, 1]
    assert [outputs["verdict"] for _, outputs in (first, second)] == ["pass", "regression"]
    assert [Path(outputs["table"]).read_text() for _, outputs in (first, second)] == [
        "table of abc\n",
        "table of def\n",
    ]
    assert (tmp_path / "STEP_SUMMARY").read_text() == "table of abc\ntable of def\n"


def table_of(*found):
    """The gate's table of quantities and their verdicts."""
    reason = "base: crashed: a | b."
    return markdown([Finding(case=CASE, quantity=q, verdict=v, reason=reason) for q, v in found], "base", "head")


@pytest.mark.parametrize(
    ("code", "allow", "ends_with"), [(3, "true", 0), (3, "false", 3), (1, "true", 1), (2, "true", 2)]
)
def test_the_job_fails_where_the_gate_says_no_or_may_not_be_ambiguous(step, code, allow, ends_with):
    assert step("abc", code, allow, table_of(("total s", "ambiguous"), ("failed s", "same")))[0] == ends_with


@pytest.mark.parametrize("verdict", ["failed", "missing"])
def test_a_case_without_an_answer_is_no_ambiguity(step, verdict):
    assert step("abc", 3, "true", table_of(("total s", "ambiguous"), ("", verdict)))[0] == 3


def test_a_gate_without_a_table_is_no_ambiguity(step):
    assert step("abc", 3, "true")[0] == 3


def test_the_default_base_is_what_a_pull_request_would_be_merged_into(step, tmp_path):
    """The first parent of the merge that is checked out, the event's base where there is none, else the parent."""
    folder = tmp_path / "checkout"
    folder.mkdir()

    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def table(**variables):
        return Path(step("", 0, folder=folder, **variables)[1]["table"]).read_text()

    git("init", "-q", "-b", "main")
    for message in ("first", "second"):
        git("commit", "-q", "--allow-empty", "-m", message)
    assert table(PULL_BASE="") == "table of HEAD~1\n"
    assert table(PULL_BASE="abc") == "table of abc\n"
    git("checkout", "-q", "-b", "change", "HEAD~1")
    git("commit", "-q", "--allow-empty", "-m", "change")
    git("merge", "-q", "--no-ff", "-m", "merge", "main")
    assert table(PULL_BASE="abc") == "table of HEAD^1\n"
