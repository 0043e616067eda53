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
# any; notes its arguments; ends with the code in $CODE.
COMMAND = """#!/bin/bash
printf '%s\\n' "$@" > "$RUNNER_TEMP/arguments"
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


def test_arguments_are_words_and_no_patterns_of_files(step, tmp_path):
    (tmp_path / "a=1").touch()
    step("abc", 0, ARGUMENTS="--option a=*  --json")
    assert (tmp_path / "arguments").read_text().splitlines()[-3:] == ["--option", "a=*", "--json"]


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


@pytest.fixture
def checkout(tmp_path):
    """Returns a function that calls git in a checkout of ``change``, a branch of one commit off the first of main's."""
    folder = tmp_path / "checkout"
    folder.mkdir()

    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q", "-b", "main")
    git("commit", "-q", "--allow-empty", "-m", "first")
    git("checkout", "-q", "-b", "change")
    git("commit", "-q", "--allow-empty", "-m", "change")
    git("checkout", "-q", "main")
    git("commit", "-q", "--allow-empty", "-m", "second")
    git("checkout", "-q", "change")
    return git


@pytest.fixture
def default_base(step, tmp_path):
    """Returns a function that returns the base that the action takes, given the base and the head of the event."""

    def default_base(pull_base="", pull_head=""):
        _, outputs = step("", 0, folder=tmp_path / "checkout", PULL_BASE=pull_base, PULL_HEAD=pull_head)
        return Path(outputs["table"]).read_text().removeprefix("table of ").strip()

    return default_base


def test_the_base_of_a_push_is_the_parent(checkout, default_base):
    assert default_base() == "HEAD~1"
    checkout("merge", "-q", "--no-ff", "-m", "merge", "main")
    assert default_base() == "HEAD~1"


def test_the_base_of_the_merge_of_a_pull_request_is_what_it_is_merged_into(checkout, default_base):
    """The event's base may be older than what GitHub merged into."""
    old_main, head = checkout("rev-parse", "main"), checkout("rev-parse", "change")
    checkout("checkout", "-q", "main")
    checkout("commit", "-q", "--allow-empty", "-m", "third")
    checkout("checkout", "-q", "--detach")
    checkout("merge", "-q", "--no-ff", "-m", "merge", "change")
    assert default_base(old_main, head) == "HEAD^1"


def test_the_base_of_a_pull_requests_own_head_is_where_it_branches_off(checkout, default_base):
    main, first = checkout("rev-parse", "main"), checkout("rev-parse", "main~1")
    assert default_base(main, checkout("rev-parse", "HEAD")) == first


def test_the_base_of_a_pull_request_that_has_merged_main_is_not_its_own_commit_before(checkout, default_base):
    """The first parent of the merge is the pull request's own commit, and may have the regression already."""
    checkout("merge", "-q", "--no-ff", "-m", "update branch", "main")
    main = checkout("rev-parse", "main")
    assert default_base(main, checkout("rev-parse", "HEAD")) == main


def test_the_base_of_a_checkout_without_its_history_is_that_of_the_event(checkout, default_base):
    assert default_base("0" * 40, checkout("rev-parse", "HEAD")) == "0" * 40
