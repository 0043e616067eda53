"""The search for the commit of a regression."""

from __future__ import annotations

import dataclasses

import pytest

from rlhfbench.gate.bisect import bisect
from rlhfbench.gate.decide import estimate
from rlhfbench.gate.findings import Finding
from rlhfkernels.config.case import Case

CASE = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=2)


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
def test_bisect_passes_over_commits_that_cannot_be_judged(quantity, verdict):
    """A commit that crashed has a regression, and no answer to what is looked for; nor has one without findings."""
    lines = []

    def compare_commit(commit):
        if commit == "c1":
            return []
        if commit == "c3":
            return [Finding(case=CASE, quantity=quantity, verdict=verdict, is_regression=verdict == "failed")]
        return [Finding(case=CASE, quantity="memory total", verdict="larger", is_regression=True)]

    found = bisect(COMMITS, compare_commit, str, lines.append)
    assert (found.commit, found.unjudged, found.note) == ("c0", [], "")
    said = ["c7 bad", "c3 cannot tell", "c4 bad", "c1 cannot tell", "c2 bad", "c0 bad"]
    assert [line.split(":")[0] for line in lines] == said


def test_bisect_names_only_unjudged_commits_that_may_be_the_first_bad_one():
    """Only c5 may be the culprit: a good commit follows c3, and a bad one follows c5."""

    def compare_commit(commit):
        if commit in ("c3", "c5"):
            return []
        is_bad = commit >= "c6"
        return [
            Finding(case=CASE, quantity="memory total", verdict="larger" if is_bad else "same", is_regression=is_bad)
        ]

    found = bisect(COMMITS, compare_commit, str, lambda line: None)
    assert (found.commit, found.unjudged) == ("c6", ["c5"])
    assert found.note == "These commits could not be judged, and one of them may be the first bad one: c5."


def test_bisect_cannot_judge_a_commit_whose_base_failed_too_where_the_head_fails():
    """A crash of both sides says nothing of a case that crashes at the bad end."""

    def compare_commit(commit):
        if commit == "c1":
            return [Finding(case=CASE, quantity="memory total", verdict="same")]
        return [Finding(case=CASE, quantity="", verdict="failed", is_regression=commit >= "c5")]

    found = bisect(COMMITS, compare_commit, str, lambda line: None)
    assert (found.commit, found.unjudged) == ("c5", ["c2", "c3", "c4"])
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
