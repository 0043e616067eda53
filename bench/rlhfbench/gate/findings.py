"""The findings of a comparison: from the records of two sides to a verdict on every quantity of every case."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rlhfbench.gate.decide import Effects, Estimate, Verdict, counted_pairs, estimates_of, judge, judge_memory
from rlhfbench.gate.pairs import pairs_of
from rlhfbench.records.derived import at
from rlhfbench.records.file import Record
from rlhfkernels.config.case import Case

TimesOf = Callable[[Case, Record, Record], "Iterable[Finding]"]
# At the moment of the highest total. Their split is comparable only where both sides peak in the same phase.
_AT_PEAK = ("model_bytes", "activation_bytes", "rollout_bytes")
_OWN_NAMES = ("total", *(key.removesuffix("_bytes") for key in _AT_PEAK))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The verdict on one quantity of one case.

    Attributes:
        case: The case.
        quantity: Such as ``total s``, ``generate s`` or ``memory total``; empty for a case that was not compared.
        verdict: The verdict.
        base: Seconds per sample or bytes of the base; ``None`` where it has none.
        head: The same of the head.
        estimates: Of a time: the ratio with its interval by each statistic, the one that decided first.
        num_set_aside: Of a time: disturbed pairs that do not count.
        reason: Why it was not compared.
        is_memory: The quantity is bytes and not seconds.
        is_regression: It makes the gate say no.
    """

    case: Case
    quantity: str
    verdict: Verdict
    base: float | None = None
    head: float | None = None
    estimates: Sequence[Estimate] = ()
    num_set_aside: int = 0
    reason: str | None = None
    is_memory: bool = False
    is_regression: bool = False

    @property
    def estimate(self) -> Estimate | None:
        """The estimate that decided."""
        return self.estimates[0] if self.estimates else None

    @property
    def ratio(self) -> float | None:
        """The ratio of head to base; ``None`` without both."""
        if self.estimate is not None:
            return self.estimate.ratio
        return self.head / self.base if self.base and self.head is not None else None

    @property
    def shown_ratio(self) -> str:
        """The ratio with its interval, if it has one."""
        if self.estimate is not None:
            return f"{self.estimate.ratio:.3f} ({self.estimate.low:.3f} to {self.estimate.high:.3f})"
        return "–" if self.ratio is None else f"{self.ratio:.4f}"


def findings_of(
    cases: Iterable[Case],
    base: Mapping[str, Record],
    head: Mapping[str, Record],
    effects: Effects,
    level: float,
    times_of: TimesOf | None = None,
) -> list[Finding]:
    """Returns the findings of every case from the records of both sides.

    Args:
        cases: The cases.
        base: The base's records, by the case's id.
        head: The head's.
        effects: What counts.
        level: Significance level.
        times_of: Returns the times of a case from its two records, not judged yet; by default, from pairs of blocks.
    """
    findings: list[Finding] = []
    for case in cases:
        old, new = base.get(case.id), head.get(case.id)
        failures = failure(old), failure(new)
        if any(failures):
            findings.append(not_compared(case, *failures, is_missing=old is None or new is None))
        elif old is not None and new is not None:
            findings += (times_of or _times)(case, old, new)
        # Memory is measured in the first block: a later one may fail.
        if old is not None and new is not None and old["outcome"] == new["outcome"] == "ok":
            findings += sizes_of(case, old, new)
    # Holm's correction is over the times of all cases.
    judged = iter(judge([found.estimates for found in findings if found.estimates], level, effects))
    return [_with_verdict(found, *next(judged)) if found.estimates else found for found in findings]


def _with_verdict(found: Finding, verdict: Verdict, estimates: Sequence[Estimate] = ()) -> Finding:
    is_regression = verdict in ("slower", "larger")
    return dataclasses.replace(found, verdict=verdict, estimates=estimates, is_regression=is_regression)


def not_compared(case: Case, base: str | None, head: str | None, *, is_missing: bool = False) -> Finding:
    """Returns the finding on a case that a side lacks or could not measure.

    It is a regression where the base measured it. Where the base is at fault, or both are, the gate cannot tell.

    Args:
        case: The case.
        base: How the base failed; ``None`` if it did not.
        head: How the head failed.
        is_missing: A side has no record of the case.
    """
    failures = {"base": base, "head": head}
    return Finding(
        case=case,
        quantity="",
        verdict="missing" if is_missing else "failed",
        reason="; ".join(f"{name}: {why}" for name, why in failures.items() if why is not None).replace(".; ", "; "),
        is_regression=base is None,
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
        base_s = statistics.fmean(pair.base[name] for pair in kept)
        head_s = statistics.fmean(pair.head[name] for pair in kept)
        known = Finding(case=case, quantity=f"{name} s", verdict="same", base=base_s, head=head_s)
        ratios = [pair.ratios[name] for pair in kept if name in pair.ratios]
        if len(ratios) == len(kept):
            num_set_aside = len(counted) - sum(counted)
            yield dataclasses.replace(known, estimates=estimates_of(ratios), num_set_aside=num_set_aside)
        elif any(step.get(name) for pair in kept for side in pair.steps for step in side):
            yield dataclasses.replace(known, verdict="ambiguous", reason="it took no time in some pairs.")
        else:
            yield known


def one_sided(case: Case, quantity: str, *, in_base: bool, is_memory: bool = False) -> Finding:
    """Returns the finding on a quantity that one side alone has, such as a phase with another name."""
    where = "base" if in_base else "head"
    return Finding(
        case=case,
        quantity=quantity,
        verdict="missing",
        reason=f"the {where} alone has it.",
        is_memory=is_memory,
        is_regression=in_base,
    )


def sizes_of(case: Case, base: Record, head: Record) -> Iterator[Finding]:
    """Yields the findings on memory: the total, that of every phase, and the parts where both peak in one phase."""
    yield _size(case, "total", at(base, "memory.total_bytes"), at(head, "memory.total_bytes"))
    phases = [at(record, "memory.phases") or {} for record in (base, head)]
    for name in dict.fromkeys([*phases[0], *phases[1]]):
        shown = f"phase {name}" if name in _OWN_NAMES else name  # a user's step may call a phase "rollout"
        if name in phases[0] and name in phases[1]:
            yield _size(case, shown, *(side[name].get("total_bytes") for side in phases))
        else:
            yield one_sided(case, f"memory {shown}", in_base=name in phases[0], is_memory=True)
    if at(base, "memory.peak_phase") != at(head, "memory.peak_phase"):
        return
    for key in _AT_PEAK:
        yield _size(case, key.removesuffix("_bytes"), at(base, f"memory.{key}"), at(head, f"memory.{key}"))
    parts = [at(record, "memory.parts") or {} for record in (base, head)]
    for name in dict.fromkeys([*parts[0], *parts[1]]):
        yield _size(case, f"part {name}", *(side.get(name, 0) for side in parts))


def _size(case: Case, name: str, base: Any, head: Any) -> Finding:
    size = Finding(case=case, quantity=f"memory {name}", verdict="same", base=base, head=head, is_memory=True)
    if base is None or head is None:
        return dataclasses.replace(size, verdict="ambiguous", reason="it was not measured.")
    return _with_verdict(size, judge_memory(base, head))
