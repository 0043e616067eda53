"""Simulated comparisons, drawn from measured pairs of a revision with itself: rates of detection and of false alarms.

Pairs are drawn with replacement, their sides exchanged at random, one phase of one case made slower, and the looks of a
real comparison taken.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rlhfbench.gate.compare import CHANGES
from rlhfbench.gate.decide import (
    MAX_LOOKS,
    MIN_PAIRS,
    PAIRS_PER_LOOK,
    Effects,
    Levels,
    Verdict,
    estimates_of,
    judge,
    share_done,
)
from rlhfbench.gate.other_rules import OTHERS, Rule, Steps
from rlhfbench.gate.pairs import BlockPair, LogRatio, pairs_of
from rlhfbench.records.blocks import quantity_of
from rlhfbench.records.file import read_records

NUM_TRIES = 200


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredCase:
    """The pairs of one case.

    Attributes:
        case_id: Its id.
        kinds: The kind of each phase.
        pairs: The pairs.
        spent_s: Seconds that they took, with what came before them.
    """

    case_id: str
    kinds: Mapping[str, str]
    pairs: Sequence[BlockPair]
    spent_s: float

    @property
    def pair_s(self) -> float:
        """Seconds of a pair. Measuring the memory before the first counts as one more."""
        return self.spent_s / (len(self.pairs) + 1)

    @property
    def quantities(self) -> list[str]:
        """The times of which every pair has a ratio."""
        return [name for name in self.pairs[0].ratios if all(name in pair.ratios for pair in self.pairs)]

    @property
    def longest_phase(self) -> str:
        """The phase that takes the most seconds."""
        return max(self.kinds, key=lambda phase: self.pairs[0].base[quantity_of(phase)])

    def affected(self, phase: str) -> set[str]:
        """The quantities that the seconds of ``phase`` are part of."""
        return {quantity_of(phase), self.kinds[phase], "total"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Verdicts of the gate over many simulated comparisons with one slower phase in one case.

    Attributes:
        slowdown: Of the phase, as a share.
        found: Share of comparisons in which a time that the phase is part of was called slower.
        ambiguous: Share in which none was, and a time of that case was ambiguous.
        false_alarms: Share of the comparisons of other cases that called them slower or faster; ``None`` with one case.
        num_pairs: Mean number of pairs of a case.
        case_s: Mean seconds of a case, both sides together.
        others: Of each other tool's rule: the shares that it found and falsely alarmed, ``None`` with one case.
    """

    slowdown: float
    found: float
    ambiguous: float
    false_alarms: float | None
    num_pairs: float
    case_s: float
    others: Mapping[str, tuple[float, float | None]]


def measured_cases(out: Path, spent_s: Mapping[str, float]) -> list[MeasuredCase]:
    """Returns the cases of a comparison whose runs lie in ``out``.

    Args:
        out: Folder of the runs of both sides.
        spent_s: Seconds spent on each case, by its id.
    """
    base, head = ({r["case"]["id"]: r for r in read_records(out / name)} for name in ("base", "head"))
    found = []
    for case_id in [case_id for case_id in base if case_id in head]:
        pairs = pairs_of(base[case_id], head[case_id])
        kinds = {name: phase["kind"] for name, phase in base[case_id]["latency"]["phases"].items()}
        if pairs:
            found.append(MeasuredCase(case_id=case_id, kinds=kinds, pairs=pairs, spent_s=spent_s[case_id]))
    return found


def rates(cases: Sequence[MeasuredCase], slowdown: float, effects: Effects, budget_s: float, *, seed: int = 0) -> Rates:
    """Returns the rates for a slowdown of the longest phase of one case, drawn at random for each try.

    Args:
        cases: Measured pairs of a revision with itself.
        slowdown: Share by which the phase is slower.
        effects: Effects that count.
        budget_s: Seconds of a case after which no more pairs are drawn.
        seed: Of the draws.
    """
    rng = random.Random(seed)
    found = ambiguous = alarms = num_pairs = 0
    spent_s = 0.0
    for _ in range(NUM_TRIES):
        target = rng.randrange(len(cases))
        verdicts, pairs = _compare(cases, target, slowdown, effects, budget_s, rng)
        affected = cases[target].affected(cases[target].longest_phase)
        is_found = any(verdicts[target].get(name) == "slower" for name in affected)
        found += is_found
        ambiguous += not is_found and "ambiguous" in verdicts[target].values()
        alarms += sum(
            not set(said.values()).isdisjoint(CHANGES) for case, said in enumerate(verdicts) if case != target
        )
        num_pairs += sum(pairs)
        spent_s += sum(case.pair_s * (num + 1) for case, num in zip(cases, pairs, strict=True))
    others = NUM_TRIES * (len(cases) - 1)
    return Rates(
        slowdown=slowdown,
        found=found / NUM_TRIES,
        ambiguous=ambiguous / NUM_TRIES,
        false_alarms=alarms / others if others else None,
        num_pairs=num_pairs / NUM_TRIES / len(cases),
        case_s=spent_s / NUM_TRIES / len(cases),
        others={name: _rates_of_rule(cases, slowdown, rule, random.Random(seed)) for name, rule in OTHERS.items()},
    )


def _rates_of_rule(
    cases: Sequence[MeasuredCase], slowdown: float, rule: Rule, rng: random.Random
) -> tuple[float, float | None]:
    """The shares of tries in which a rule flags the slower case, and falsely one of the others, in any quantity."""
    found = alarms = 0
    for _ in range(NUM_TRIES):
        target = rng.randrange(len(cases))
        for place, case in enumerate(cases):
            pairs = rng.sample(case.pairs, 2) if len(case.pairs) > 1 else [*case.pairs] * 2
            drawn = [_steps(case, pair, slowdown if place == target else 0.0, rng) for pair in pairs]
            flagged = rule.flagged(case.quantities, *drawn)
            found += place == target and bool(flagged & case.affected(case.longest_phase))
            alarms += place != target and bool(flagged)
    others = NUM_TRIES * (len(cases) - 1)
    return found / NUM_TRIES, alarms / others if others else None


def _steps(case: MeasuredCase, pair: BlockPair, slowdown: float, rng: random.Random) -> Steps:
    """The steps of a pair whose sides are exchanged at random; the head's longest phase is slower."""
    base, head = rng.sample(pair.steps, 2)
    if not slowdown:
        return base, head
    phase = case.longest_phase
    affected = case.affected(phase)
    return base, [
        {name: value + slowdown * step[quantity_of(phase)] * (name in affected) for name, value in step.items()}
        for step in head
    ]


def _compare(
    cases: Sequence[MeasuredCase],
    target: int,
    slowdown: float,
    effects: Effects,
    budget_s: float,
    rng: random.Random,
) -> tuple[list[dict[str, Verdict]], list[int]]:
    """The verdicts by quantity on every case of one simulated comparison, and the pairs that each needed."""
    draws = [_ratios(case, slowdown if place == target else 0.0, rng) for place, case in enumerate(cases)]
    kept: list[dict[str, list[list[LogRatio]]]] = [{} for _ in cases]
    num_pairs, undecided = [0] * len(cases), list(range(len(cases)))
    verdicts: dict[tuple[int, str], Verdict] = {}
    levels = Levels()

    def spent_s(place: int) -> float:
        return cases[place].pair_s * (num_pairs[place] + 1)

    def judged(share: float) -> dict[tuple[int, str], Verdict]:
        flat = {(place, name): estimates_of(ratios) for place, case in enumerate(kept) for name, ratios in case.items()}
        found = judge(list(flat.values()), levels.take(share), effects)
        changes = {key: said for key, said in verdicts.items() if said in CHANGES}
        return {**{key: said for key, (said, _) in zip(flat, found, strict=True)}, **changes}

    for look in range(1, MAX_LOOKS + 1):
        for place in undecided:
            num_new = MIN_PAIRS if look == 1 else PAIRS_PER_LOOK
            num_pairs[place] += num_new
            for _ in range(num_new):
                for name, ratios in next(draws[place]).items():
                    kept[place].setdefault(name, []).append(ratios)
        verdicts = judged(share_done(look, min(map(spent_s, undecided)), budget_s))
        ambiguous = {place for (place, _), said in verdicts.items() if said == "ambiguous"}
        undecided = [place for place in sorted(ambiguous) if spent_s(place) < budget_s]
        if not undecided:
            verdicts = judged(1.0)
            break
    by_case = [{name: said for (of, name), said in verdicts.items() if of == place} for place in range(len(cases))]
    return by_case, num_pairs


def _ratios(case: MeasuredCase, slowdown: float, rng: random.Random) -> Iterator[dict[str, list[LogRatio]]]:
    """Ratios by quantity, of pairs that are drawn, exchanged and slowed down."""
    phase, quantities = case.longest_phase, case.quantities
    affected = case.affected(phase)
    while True:
        pair, sign = rng.choice(case.pairs), rng.choice((-1, 1))
        added = {name: slowdown * pair.head[quantity_of(phase)] / pair.head[name] for name in affected}
        yield {
            name: [
                LogRatio(sign * value + math.log1p(added.get(name, 0.0)), error) for value, error in pair.ratios[name]
            ]
            for name in quantities
        }
