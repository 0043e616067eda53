"""Output of the gate: a table in Markdown or JSON, and the exit code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhfbench.gate.decide import Verdict
from rlhfbench.gate.findings import Finding
from rlhfbench.runs.titles import Titles

PASS, REGRESSED, CANNOT_TELL = 0, 1, 3
_NO_ANSWER = ("ambiguous", "missing", "failed")
_MIB = 2**20


def exit_code(findings: Sequence[Finding]) -> int:
    """Returns 1 for a regression, else 3 where something could not be compared or is ambiguous, else 0."""
    if any(found.is_regression for found in findings):
        return REGRESSED
    return CANNOT_TELL if not findings or open_verdicts(findings) else PASS


def open_verdicts(findings: Sequence[Finding]) -> set[Verdict]:
    """Returns the verdicts among those found that are no answer: more pairs may settle ``ambiguous`` alone."""
    return {found.verdict for found in findings if found.verdict in _NO_ANSWER}


def to_json(findings: Sequence[Finding], **more: Any) -> dict[str, Any]:
    """Returns everything as an object: ``exit_code``, ``findings``, and what is given."""
    return {**more, "exit_code": exit_code(findings), "findings": [entry(found) for found in findings]}


def entry(found: Finding) -> dict[str, Any]:
    """Returns one finding as an object."""
    ratio = found.estimate
    return {
        "case": found.case.to_dict(),
        "quantity": found.quantity or None,
        "verdict": found.verdict,
        "base": found.base,
        "head": found.head,
        "ratio": found.ratio,
        "interval": [ratio.low, ratio.high] if ratio else None,
        "p_value": ratio.p_value if ratio else None,
        "num_pairs": ratio.num_pairs if ratio else None,
        "num_pairs_set_aside": found.num_set_aside,
        "reason": found.reason,
    }


def markdown(findings: Sequence[Finding], base: str, head: str) -> str:
    """Returns the answer in one line, a table of totals and of all that differs, and how many quantities are the same.

    Args:
        findings: Of all cases.
        base: The base in words.
        head: The head in words.
    """
    shown = [found for found in findings if found.verdict != "same" or found.quantity in ("total s", "memory total")]
    lines = [f"**{_answer(findings)}** {head} against {base}."]
    if shown:
        lines += ["", "| case | quantity | base | head | ratio | verdict |", "| --- | --- | ---: | ---: | ---: | --- |"]
        titles = Titles((found.case for found in findings), is_alone=True)
        lines += [_row(found, titles(found.case)) for found in shown]
    num_same = sum(found.verdict == "same" for found in findings)
    num_pairs = sorted({found.estimate.num_pairs for found in findings if found.estimate is not None})
    last = f"{num_same} of {len(findings)} quantities are the same. A ratio is head / base."
    if num_pairs:
        least, most = num_pairs[0], num_pairs[-1]
        last += f" Pairs of blocks: {least}." if least == most else f" Pairs of blocks: {least} to {most}."
    num_set_aside = max((found.num_set_aside for found in findings), default=0)
    if num_set_aside:
        last += f" Beside other load, and set aside: up to {num_set_aside} pairs of a case."
    lines += ["", last]
    return "\n".join(lines) + "\n"


def _answer(findings: Sequence[Finding]) -> str:
    worse = [found for found in findings if found.is_regression]
    if worse:
        return f"Regression: {len(worse)} {'quantity' if len(worse) == 1 else 'quantities'}."
    if exit_code(findings) == CANNOT_TELL:
        return "Cannot tell."
    better = sum(found.verdict in ("faster", "smaller") for found in findings)
    return f"No regression; better: {better}." if better else "No regression."


def _row(found: Finding, title: str) -> str:
    cells = [title, found.quantity or "–", *(_size(found, value) for value in (found.base, found.head))]
    cells += [found.shown_ratio, found.verdict if found.reason is None else f"{found.verdict}: {found.reason}"]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _size(found: Finding, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / _MIB:.3f} MiB" if found.is_memory else f"{value:.4g} s"
