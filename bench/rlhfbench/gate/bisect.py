"""Finds the commit that made a step slower or larger."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhfbench.errors import GateError
from rlhfbench.gate.findings import Finding
from rlhfbench.gate.output import CANNOT_TELL, exit_code
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
    def regressions(self) -> set[tuple[str, str, str]]:
        """(case, quantity, verdict) of every regression."""
        return {(found.case.id, found.quantity, found.verdict) for found in self.findings if found.is_regression}

    @property
    def is_clear(self) -> bool:
        """True if every quantity has an answer."""
        return exit_code(self.findings) != CANNOT_TELL

    def __str__(self) -> str:
        """The judgement, and the interval of the ratio that differs most."""
        ratios = [found.estimate for found in self.findings if found.estimate is not None]
        most = max(ratios, key=lambda ratio: abs(ratio.ratio - 1), default=None)
        sure = f" (largest ratio {most.ratio:.3f}, {most.low:.3f} to {most.high:.3f})" if most else ""
        word = "bad" if self.regressions else "good" if self.is_clear else "cannot tell, taken as good"
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

    A commit is bad if it has a regression that the last one has: another, such as one that was mended since, is not
    what is looked for.

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
    wanted, unclear = culprit.regressions, []
    if not wanted:
        return None
    low, high = 0, len(commits) - 1
    while low < high:
        middle = (low + high) // 2
        tested = test(commits[middle])
        if tested.regressions & wanted:
            culprit, high = tested, middle
        else:
            low = middle + 1
            if not tested.is_clear:
                unclear.append(tested.commit[:10])
    if unclear:
        tell(f"These commits could not be judged, and one of them may be the first bad one: {', '.join(unclear)}.")
    return culprit
