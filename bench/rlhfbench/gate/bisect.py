"""Finds the commit that made a step slower or larger."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhfbench.errors import GateError
from rlhfbench.gate.compare import Finding
from rlhfbench.gate.output import REGRESSED, exit_code
from rlhfbench.gate.sides import commit_of, git


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tested:
    """One step of a bisection.

    Attributes:
        commit: The commit that was compared with the good one.
        subject: First line of its message.
        findings: What was found.
    """

    commit: str
    subject: str
    findings: Sequence[Finding]

    @property
    def is_bad(self) -> bool:
        """True if it has a regression."""
        return exit_code(self.findings) == REGRESSED

    def __str__(self) -> str:
        """The judgement and how sure it is."""
        p_values = [found.estimate.p_value for found in self.findings if found.estimate and found.verdict == "slower"]
        sure = f", p = {min(p_values):.2g}" if p_values else ""
        word = {0: "good", 1: "bad"}.get(exit_code(self.findings), "cannot tell, taken as good")
        return f"{self.commit[:10]} {word}{sure}: {self.subject}"


def commits_between(good: str, bad: str, root: Path) -> list[str]:
    """Returns the commits after ``good`` up to ``bad``, oldest first, along the first parents.

    Raises:
        GateError: ``good`` is no ancestor of ``bad``.
    """
    first, last = commit_of(good, root), commit_of(bad, root)
    found = git("rev-list", "--reverse", "--first-parent", f"{first}..{last}", folder=root).split()
    if not found or git("merge-base", first, last, folder=root) != first:
        raise GateError(f"--bisect {good} {bad}: the first must be an ancestor of the second.")
    return found


def bisect(
    commits: Sequence[str],
    compare: Callable[[str], Sequence[Finding]],
    subject: Callable[[str], str],
    tell: Callable[[str], None],
) -> Tested | None:
    """Returns the first bad commit with what was found there; ``None`` if the last commit is not bad.

    Args:
        commits: Oldest first. All before the culprit are good, all from it on are bad.
        compare: Returns the findings of a commit against the good revision.
        subject: Returns the first line of a commit's message.
        tell: Receives a line for each commit that was compared.
    """

    def test(commit: str) -> Tested:
        tested = Tested(commit=commit, subject=subject(commit), findings=compare(commit))
        tell(str(tested))
        return tested

    culprit = test(commits[-1])
    if not culprit.is_bad:
        return None
    low, high = 0, len(commits) - 1
    while low < high:
        middle = (low + high) // 2
        tested = test(commits[middle])
        if tested.is_bad:
            culprit, high = tested, middle
        else:
            low = middle + 1
    return culprit
