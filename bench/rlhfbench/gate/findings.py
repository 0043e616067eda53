"""The findings of a comparison: from the records of two sides to a verdict on every quantity of every case."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rlhfbench.gate.decide import Effects, Estimate, Verdict, counted_pairs, estimate, judge, judge_memory
from rlhfbench.gate.pairs import pairs_of
from rlhfbench.records.derived import at
from rlhfbench.records.file import Record
from rlhfkernels.config.case import Case

RecordOf = Callable[[Case], "Record | None"]
# At the moment of the highest total. Their split is comparable only where both sides peak in the same phase.
_AT_PEAK = ("model_bytes", "activation_bytes", "rollout_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The verdict on one quantity of one case.

    Attributes:
        case: The case.
        quantity: Such as ``total s``, ``generate s`` or ``memory total``; empty for a case that was not compared.
        verdict: The verdict.
        base: Seconds per sample or bytes of the base; ``None`` where it has none.
        head: The same of the head.
        estimate: Of a time: the ratio with its interval.
        num_set_aside: Of a time: disturbed pairs that do not count.
        reason: Why it was not compared.
        is_regression: It makes the gate say no.
    """

    case: Case
    quantity: str
    verdict: Verdict
    base: float | None = None
    head: float | None = None
    estimate: Estimate | None = None
    num_set_aside: int = 0
    reason: str | None = None
    is_regression: bool = False


def findings_of(
    cases: Iterable[Case], base_of: RecordOf, head_of: RecordOf, effects: Effects, level: float
) -> list[Finding]:
    """Returns the findings of every case from the records of both sides.

    Args:
        cases: The cases.
        base_of: Returns the base's record of a case, or ``None``.
        head_of: Returns the head's.
        effects: What counts.
        level: Significance level.
    """
    findings: list[Finding] = []
    for case in cases:
        base, head = base_of(case), head_of(case)
        if base is None or head is None or failure(base) is not None or failure(head) is not None:
            findings.append(_not_compared(case, base, head))
        else:
            findings += [*_times(case, base, head), *sizes_of(case, base, head)]
    return judged(findings, level, effects)


def judged(findings: Iterable[Finding], level: float, effects: Effects) -> list[Finding]:
    """Returns ``findings`` with a verdict for each that has an estimate; Holm's correction is over all of these."""
    findings = list(findings)
    times = [found for found in findings if found.estimate is not None]
    verdicts = iter(judge([found.estimate for found in times if found.estimate is not None], level, effects))
    return [found if found.estimate is None else _with_verdict(found, next(verdicts)) for found in findings]


def _with_verdict(found: Finding, verdict: Verdict) -> Finding:
    return dataclasses.replace(found, verdict=verdict, is_regression=verdict in ("slower", "larger"))


def _not_compared(case: Case, base: Record | None, head: Record | None) -> Finding:
    """The finding on a case that a side lacks or could not measure.

    It is a regression where the base measured it. Where the base is at fault, or both are, the gate cannot tell.
    """
    failures = {"base": failure(base), "head": failure(head)}
    reason = "; ".join(f"{name}: {why}" for name, why in failures.items() if why is not None)
    return Finding(
        case=case,
        quantity="",
        verdict="missing" if base is None or head is None else "failed",
        reason=reason,
        is_regression=failures["base"] is None,
    )


def failure(record: Record | None) -> str | None:
    """Returns how a side failed, in its first block or a later one; ``None`` if it did not."""
    if record is None:
        return "there is no record of it."
    errors = [{"outcome": record["outcome"], **(record["error"] or {})}] if record["outcome"] != "ok" else []
    errors += [block["error"] for block in record["latency"]["blocks"] or () if block.get("error") is not None]
    return f"{errors[0].get('outcome')}: {errors[0].get('message') or 'no message.'}" if errors else None


def _times(case: Case, base: Record, head: Record) -> Iterator[Finding]:
    """Yields every time, not judged yet, from the pairs that count; ``missing`` where one side alone has it."""
    pairs = pairs_of(base, head)
    counted = counted_pairs([pair.disturbed for pair in pairs])
    kept = [pair for pair, counts in zip(pairs, counted, strict=True) if counts]
    if len(kept) < 2:
        yield Finding(case=case, quantity="times", verdict="ambiguous", reason="fewer than two pairs of blocks.")
        return
    for name in dict.fromkeys([*kept[0].base, *kept[0].head]):
        if name not in kept[0].base or name not in kept[0].head:
            yield one_sided(case, f"{name} s", in_base=name in kept[0].base)
            continue
        if all(name in pair.log_ratios for pair in kept):
            yield Finding(
                case=case,
                quantity=f"{name} s",
                verdict="ambiguous",
                base=statistics.fmean(pair.base[name] for pair in kept),
                head=statistics.fmean(pair.head[name] for pair in kept),
                estimate=estimate([pair.log_ratios[name] for pair in kept], [pair.errors[name] for pair in kept]),
                num_set_aside=len(counted) - sum(counted),
            )


def one_sided(case: Case, quantity: str, *, in_base: bool) -> Finding:
    """Returns the finding on a quantity that one side alone has, such as a phase with another name."""
    where = "base" if in_base else "head"
    return Finding(
        case=case, quantity=quantity, verdict="missing", reason=f"the {where} alone has it.", is_regression=in_base
    )


def sizes_of(case: Case, base: Record, head: Record) -> Iterator[Finding]:
    """Yields the findings on memory: the total, that of every phase, and the parts where both peak in one phase."""
    yield _size(case, "total", at(base, "memory.total_bytes"), at(head, "memory.total_bytes"))
    phases = [at(record, "memory.phases") or {} for record in (base, head)]
    for name in dict.fromkeys([*phases[0], *phases[1]]):
        if name in phases[0] and name in phases[1]:
            yield _size(case, name, *(side[name].get("total_bytes") for side in phases))
        else:
            yield one_sided(case, f"memory {name}", in_base=name in phases[0])
    if at(base, "memory.peak_phase") != at(head, "memory.peak_phase"):
        return
    for key in _AT_PEAK:
        yield _size(case, key.removesuffix("_bytes"), at(base, f"memory.{key}"), at(head, f"memory.{key}"))
    parts = [at(record, "memory.parts") or {} for record in (base, head)]
    for name in dict.fromkeys([*parts[0], *parts[1]]):
        yield _size(case, f"part {name}", *(side.get(name, 0) for side in parts))


def _size(case: Case, name: str, base: Any, head: Any) -> Finding:
    quantity = f"memory {name}"
    if base is None or head is None:
        return Finding(case=case, quantity=quantity, verdict="ambiguous", reason="it was not measured.")
    return _with_verdict(
        Finding(case=case, quantity=quantity, verdict="same", base=base, head=head), judge_memory(base, head)
    )
