"""Rates of false alarms and of detection of the gate on this machine.

Pairs of a revision with itself are measured. Comparisons are then simulated from them: pairs are drawn with
replacement, their sides exchanged at random, one phase of one case multiplied, and the looks of a real comparison
taken.
Real comparisons with a fault in the step stand beside.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import GateError
from rlhfbench.gate.compare import MAX_LOOKS, PAIRS_PER_LOOK, Comparison, GateOptions
from rlhfbench.gate.decide import MIN_PAIRS, Effects, Levels, Verdict, estimate, judge
from rlhfbench.gate.findings import Finding
from rlhfbench.gate.pairs import Pair, pairs_of
from rlhfbench.gate.sides import Side
from rlhfbench.records.file import read_records

SLOWDOWNS = (0.02, 0.05, 0.10, 0.20)
HELD_BYTES = 64 * 1024
NUM_TRIES = 200
_PROMISED_SHARE = 0.95  # of the tries in which an effect must be found to be promised


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredCase:
    """The pairs of one case.

    Attributes:
        kinds: The kind of each phase.
        pairs: The pairs.
    """

    kinds: Mapping[str, str]
    pairs: Sequence[Pair]

    @property
    def longest_phase(self) -> str:
        """The phase that takes the most seconds."""
        return max(self.kinds, key=self.pairs[0].base.__getitem__)

    def affected(self, phase: str) -> set[str]:
        """The quantities that the seconds of ``phase`` are part of."""
        return {phase, self.kinds[phase], "total"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Verdicts of the gate over many simulated comparisons with one slower phase in one case.

    Attributes:
        slowdown: Of the phase, as a share.
        found: Share of comparisons in which the slower case was called slower.
        ambiguous: Share in which that case was neither slower nor the same.
        false_alarms: Share of the comparisons of other cases that called them slower or faster.
        num_pairs: Mean number of pairs of a case.
    """

    slowdown: float
    found: float
    ambiguous: float
    false_alarms: float
    num_pairs: float


def compare_with_itself(
    side: Side, sweep: Sweep, out: Path, options: GateOptions, injected: dict[str, Any] | None
) -> list[Finding]:
    """Compares a revision with itself, with a fault in the head's step unless ``injected`` is ``None``."""
    base, head = (dataclasses.replace(side, name=name) for name in ("base", "head"))
    return Comparison(base, head, sweep, out, options).run(injected)


def measured_cases(out: Path) -> list[MeasuredCase]:
    """Returns the cases of a comparison whose runs lie in ``out``."""
    base, head = ({r["case"]["id"]: r for r in read_records(out / name)} for name in ("base", "head"))
    found = []
    for case_id in base.keys() & head.keys():
        pairs = pairs_of(base[case_id], head[case_id])
        kinds = {name: phase["kind"] for name, phase in base[case_id]["latency"]["phases"].items()}
        if pairs:
            found.append(MeasuredCase(kinds=kinds, pairs=pairs))
    return found


def rates(cases: Sequence[MeasuredCase], slowdown: float, effects: Effects, *, seed: int = 0) -> Rates:
    """Returns the rates for a slowdown of the longest phase of one case, drawn at random for each try."""
    rng = random.Random(seed)
    found = ambiguous = alarms = num_pairs = 0
    for _ in range(NUM_TRIES):
        target = rng.randrange(len(cases))
        verdicts, pairs = _compare(cases, target, slowdown, effects, rng)
        found += "slower" in verdicts[target]
        ambiguous += "ambiguous" in verdicts[target] and "slower" not in verdicts[target]
        alarms += sum(bool(said & {"slower", "faster"}) for case, said in enumerate(verdicts) if case != target)
        num_pairs += sum(pairs)
    others = NUM_TRIES * (len(cases) - 1)
    return Rates(
        slowdown=slowdown,
        found=found / NUM_TRIES,
        ambiguous=ambiguous / NUM_TRIES,
        false_alarms=alarms / others if others else 0.0,
        num_pairs=num_pairs / NUM_TRIES / len(cases),
    )


def _compare(
    cases: Sequence[MeasuredCase], target: int, slowdown: float, effects: Effects, rng: random.Random
) -> tuple[list[set[Verdict]], list[int]]:
    """The verdicts on every case of one simulated comparison, and the pairs that each needed."""
    draws = [_logs(case, slowdown if place == target else 0.0, rng) for place, case in enumerate(cases)]
    kept: list[dict[str, list[float]]] = [{} for _ in cases]
    num_pairs = [0] * len(cases)
    verdicts: list[set[Verdict]] = [{"ambiguous"} for _ in cases]
    levels = Levels()
    for look in range(1, MAX_LOOKS + 1):
        num_new = MIN_PAIRS if look == 1 else PAIRS_PER_LOOK
        for place in [place for place, said in enumerate(verdicts) if "ambiguous" in said]:
            num_pairs[place] += num_new
            for _ in range(num_new):
                for name, value in next(draws[place]).items():
                    kept[place].setdefault(name, []).append(value)
        flat = [(place, estimate(logs)) for place, case in enumerate(kept) for logs in case.values()]
        judged = judge([found for _, found in flat], levels.take(look / MAX_LOOKS), effects)
        verdicts = [
            {said for (of, _), said in zip(flat, judged, strict=True) if of == place} for place in range(len(cases))
        ]
        if not any("ambiguous" in said for said in verdicts):
            break
    return verdicts, num_pairs


def _logs(case: MeasuredCase, slowdown: float, rng: random.Random) -> Iterator[dict[str, float]]:
    """Logarithms of head / base by quantity, of pairs that are drawn, exchanged and slowed down, without end."""
    phase = case.longest_phase
    affected = case.affected(phase)
    while True:
        pair, sign = rng.choice(case.pairs), rng.choice((-1, 1))
        added = {name: slowdown * pair.head[phase] / pair.head[name] for name in affected}
        yield {name: sign * ratio + math.log1p(added.get(name, 0.0)) for name, ratio in pair.log_ratios.items()}


def self_test(side: Side, sweep: Sweep, out: Path, options: GateOptions, tell: Callable[[str], None]) -> list[Rates]:
    """Measures a revision against itself, clean and with faults, and tells what was found line by line.

    Raises:
        GateError: no case could be measured.
    """
    # As many pairs as a comparison can take: an ambiguity that never ends. Few pairs would make all draws alike.
    patient = dataclasses.replace(options, effects=Effects(smallest=options.effects.smallest, promised=1e-9))
    clean = compare_with_itself(side, sweep, out / "clean", patient, None)
    cases = measured_cases(out / "clean")
    if not cases:
        raise GateError(f"no case could be measured: {clean[0].reason}")
    alarms = [found for found in clean if found.verdict in ("slower", "faster", "larger", "smaller")]
    tell(f"itself: {len(alarms)} false alarms in {len(sweep.cases)} cases, {len(clean)} quantities")
    held = compare_with_itself(side, sweep, out / "held", options, {"held_bytes": HELD_BYTES})
    tell(f"{HELD_BYTES} bytes held over a step: found in {_num_cases(held, 'larger')} of {len(sweep.cases)} cases")
    phase = cases[0].longest_phase
    for slowdown in SLOWDOWNS:
        fault = {"phase": phase, "share": slowdown}
        slower = compare_with_itself(side, sweep, out / f"slower-{slowdown:g}", options, fault)
        told = (
            f"{_num_cases(slower, 'slower')} of {len(sweep.cases)} cases, cannot tell {_num_cases(slower, 'ambiguous')}"
        )
        tell(f"{phase} slower by {slowdown:.0%}, measured: found in {told}")
    found = [rates(cases, slowdown, options.effects) for slowdown in (0.0, *SLOWDOWNS)]
    for row in found:
        elsewhere = f", false alarms elsewhere {row.false_alarms:.2%}" if len(cases) > 1 else ""
        tell(
            f"one phase slower by {row.slowdown:.0%}, simulated: found {row.found:.0%}, cannot tell {row.ambiguous:.0%}"
            f"{elsewhere}, {row.num_pairs:.1f} pairs a case"
        )
    promised = [row for row in found if row.slowdown and row.found >= _PROMISED_SHARE]
    if promised:
        tell(f"This machine can promise to find a phase that is slower by {promised[0].slowdown:.0%}.")
    else:
        tell(f"This machine can promise no slowdown up to {SLOWDOWNS[-1]:.0%}: it is too noisy for these cases.")
    return found


def _num_cases(findings: Sequence[Finding], verdict: Verdict) -> int:
    return len({found.case.id for found in findings if found.verdict == verdict})
