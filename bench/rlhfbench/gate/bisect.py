"""Finds the commit that made a step slower or larger."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from rlhfbench.errors import GateError
from rlhfbench.gate.findings import Finding
from rlhfbench.gate.output import CANNOT_TELL, exit_code, open_verdicts
from rlhfbench.gate.sides import commit_of, cut_off, git

Judgement = Literal["good", "bad", "cannot tell"]
Regression = tuple[str, str, str]  # case, quantity, verdict


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tested:
    """One step of a bisection.

    Attributes:
        commit: The commit that was compared with the good one.
        subject: First line of its message.
        findings: What was found.
        unjudged: In the answer of a bisection, the commits that could not be judged and may be the first bad one.
    """

    commit: str
    subject: str
    findings: Sequence[Finding]
    unjudged: Sequence[str] = ()

    @property
    def note(self) -> str:
        """A sentence on the commits that could not be judged; empty without any."""
        names = ", ".join(commit[:10] for commit in self.unjudged)
        said = "These commits could not be judged, and one of them may be the first bad one"
        return f"{said}: {names}." if names else ""

    @property
    def regressions(self) -> set[Regression]:
        """Every regression."""
        return {(found.case.id, found.quantity, found.verdict) for found in self.findings if found.is_regression}

    @property
    def is_clear(self) -> bool:
        """True if every quantity has an answer."""
        return exit_code(self.findings) != CANNOT_TELL

    def judged(self, wanted: set[Regression]) -> Judgement:
        """Returns whether the commit has one of the ``wanted`` regressions.

        It cannot be told where a quantity that regressed has no answer here, such as in a case that crashed.
        """
        if self.regressions & wanted:
            return "bad"
        if not wanted:
            return "good" if self.is_clear else "cannot tell"
        has_answer = {(found.case.id, found.quantity): not open_verdicts([found]) for found in self.findings}
        # A whole case, which has no quantity, is among the findings only where it failed or is missing.
        is_open = any(not has_answer.get((case, quantity), not quantity) for case, quantity, _ in wanted)
        return "cannot tell" if is_open or not self.findings else "good"

    def line(self, judgement: Judgement, wanted: set[Regression]) -> str:
        """Returns the judgement, the most different of the quantities that it goes by, and the commit's subject."""
        names = {(case, quantity) for case, quantity, _ in wanted}
        rated = [found for found in self.findings if found.ratio is not None]
        asked = [found for found in rated if not names or (found.case.id, found.quantity) in names]
        asked = [found for found in asked if found.is_regression] or asked
        most = max(asked, key=lambda found: abs((found.ratio or 0) - 1), default=None)
        sure = f" ({most.quantity}: {most.shown_ratio})" if most is not None else ""
        return f"{self.commit[:10]} {judgement}{sure}: {self.subject}"


def commits_between(good: str, bad: str, root: Path) -> list[str]:
    """Returns the commits after ``good`` up to ``bad``, oldest first, along the first parents.

    Raises:
        GateError: ``good`` is no ancestor of ``bad``.
    """
    first, last = commit_of(good, root), commit_of(bad, root)
    newer = git("rev-list", last, folder=root).split()
    if first == last or first not in newer:
        raise GateError(
            f"--bisect {good} {bad}: the first must be an ancestor of the second in '{root}'{cut_off(root)}."
        )
    return git("rev-list", "--reverse", "--first-parent", f"{first}..{last}", folder=root).split()


def bisect(
    commits: Sequence[str],
    compare: Callable[[str], Sequence[Finding]],
    subject: Callable[[str], str],
    tell: Callable[[str], None],
) -> Tested:
    """Returns the first bad commit with what was found there, or the last commit if that one is not bad.

    A commit is bad if it has a regression that the last one has: another, such as one that was mended since, is not
    what is looked for. A last commit without a regression is good, or could not be judged: ``is_clear`` tells. Another
    one that cannot be judged is passed over, and its neighbours are asked.

    Args:
        commits: Oldest first. All before the culprit are good, all from it on are bad.
        compare: Returns the findings of a commit against the good revision.
        subject: Returns the first line of a commit's message.
        tell: Receives a line for each commit that was compared.
    """

    def test(commit: str) -> Tested:
        return Tested(commit=commit, subject=subject(commit), findings=compare(commit))

    culprit = test(commits[-1])
    wanted = culprit.regressions
    tell(culprit.line(culprit.judged(wanted), wanted))
    if not wanted:
        return culprit
    unjudged: list[str] = []
    left = list(commits)  # those that may be the first bad one; the last of them is bad
    while judgeable := [i for i, commit in enumerate(left[:-1]) if commit not in unjudged]:
        middle = judgeable[len(judgeable) // 2]
        tested = test(left[middle])
        judgement = tested.judged(wanted)
        tell(tested.line(judgement, wanted))
        if judgement == "bad":
            culprit, left = tested, left[: middle + 1]
        elif judgement == "good":
            left = left[middle + 1 :]
        else:
            unjudged.append(tested.commit)
    return dataclasses.replace(culprit, unjudged=left[:-1])
