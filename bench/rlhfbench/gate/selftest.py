"""The self-test: what the gate can promise on this machine.

Pairs of a revision with itself are measured, and comparisons simulated from them. Real comparisons with a fault in the
step stand beside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import GateError
from rlhfbench.gate.compare import CHANGES, Comparison, Fault, GateOptions
from rlhfbench.gate.decide import Effects, Verdict
from rlhfbench.gate.findings import Finding
from rlhfbench.gate.output import entry
from rlhfbench.gate.sides import Side
from rlhfbench.gate.simulation import Rates, measured_cases, rates
from rlhfbench.runs.titles import Titles
from rlhfkernels.config.case import Case

SLOWDOWNS = (0.02, 0.05, 0.10, 0.20)
HELD_BYTES = 64 * 1024
_PROMISED_SHARE = 0.95  # of the tries in which an effect must be found to be promised


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Slowed:
    """A real comparison in which the longest phase of every case is slower.

    Attributes:
        slowdown: Of the phase, as a share.
        num_found: Cases in which it was found.
        num_ambiguous: Other cases in which a quantity is ambiguous.
    """

    slowdown: float
    num_found: int
    num_ambiguous: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SelfTest:
    """The answers of a self-test. All but ``rates`` and ``promised`` are of real comparisons.

    Attributes:
        num_cases: Cases of each comparison.
        num_quantities: Quantities of the unchanged revision.
        not_measured: The findings on cases that could not be measured.
        false_alarms: Those on quantities of the unchanged revision that were called changed.
        num_held_found: Cases in which the tensor that is held was found.
        slowed: A comparison for each slowdown.
        rates: Simulated, without a slowdown and with each.
        promised: The rates of the smallest slowdown that is found often enough to be promised; ``None`` for none.
    """

    num_cases: int
    num_quantities: int
    not_measured: Sequence[Finding]
    false_alarms: Sequence[Finding]
    num_held_found: int
    slowed: Sequence[Slowed]
    rates: Sequence[Rates]
    promised: Rates | None

    def to_json(self) -> dict[str, Any]:
        """Everything as an object."""
        return {
            "num_cases": self.num_cases,
            "num_quantities": self.num_quantities,
            "not_measured": [entry(found) for found in self.not_measured],
            "false_alarms": [entry(found) for found in self.false_alarms],
            "held": {"bytes": HELD_BYTES, "num_found": self.num_held_found},
            "slowed": [dataclasses.asdict(row) for row in self.slowed],
            "rates": [dataclasses.asdict(row) for row in self.rates],
            "promised_slowdown": self.promised.slowdown if self.promised else None,
        }


def self_test(side: Side, sweep: Sweep, out: Path, options: GateOptions, tell: Callable[[str], None]) -> SelfTest:
    """Measures a revision against itself, clean and with faults, and tells what was found line by line.

    Raises:
        GateError: no case could be measured.
    """
    # As many pairs as a comparison can take: an ambiguity that never ends. Few pairs would make all draws alike.
    never = Effects(smallest=options.effects.smallest, promised=1e-9)
    patient = dataclasses.replace(options, effects=never, budget_s=3 * options.budget_s, pair_s=options.turns_s)
    base, head = (dataclasses.replace(side, name=name) for name in ("base", "head"))
    comparison = Comparison(base, head, sweep, out / "clean", patient)
    clean = comparison.run()
    cases = measured_cases(out / "clean", comparison.spent_s)
    if not cases:
        raise GateError(f"no case could be measured: {clean[0].reason}")
    titles = Titles(sweep.cases)
    not_measured = [found for found in clean if found.verdict == "failed"]
    for failed in not_measured:
        tell(f"{titles(failed.case)} could not be measured: {failed.reason}")
    alarms = [found for found in clean if found.verdict in CHANGES]
    tell(f"itself: {len(alarms)} false alarms in {len(sweep.cases)} cases, {len(clean)} quantities")
    for alarm in alarms:
        tell(f"    {titles(alarm.case)}: {alarm.quantity} {alarm.verdict}, {alarm.shown_ratio}")
    held = Comparison(base, head, sweep, out / "held", options).run(held_tensor)
    num_held_found = _num_cases(held, "larger")
    tell(f"{HELD_BYTES} bytes held over a step: found in {num_held_found} of {len(sweep.cases)} cases")
    phases = {case.case_id: case.longest_phase for case in cases}
    affected = {case.case_id: {f"{name} s" for name in case.affected(case.longest_phase)} for case in cases}
    slowed = []
    for slowdown in SLOWDOWNS:
        slower = Comparison(base, head, sweep, out / f"slower-{slowdown:g}", options).run(
            slower_phase(phases, slowdown)
        )
        num_found, num_open = found_and_open(slower, affected)
        slowed.append(Slowed(slowdown=slowdown, num_found=num_found, num_ambiguous=num_open))
        told = f"{num_found} of {len(sweep.cases)} cases, cannot tell {num_open}"
        tell(f"the longest phase slower by {slowdown:.0%}, measured: found in {told}")
    simulated = [rates(cases, slowdown, options.effects, options.budget_s) for slowdown in (0.0, *SLOWDOWNS)]
    for row in simulated:
        tell(
            f"one phase slower by {row.slowdown:.0%}, simulated: found {row.found:.0%}, cannot tell {row.ambiguous:.0%}"
            f"{_elsewhere(row.false_alarms, '.2%')}, {row.num_pairs:.1f} pairs and {row.case_s:.0f} s a case"
        )
        for name, (detected, alarmed) in row.others.items():
            tell(f"    {name}: found {detected:.0%}{_elsewhere(alarmed, '.0%')}")
    promised = next((row for row in simulated if row.slowdown and row.found >= _PROMISED_SHARE), None)
    if promised is not None:
        tell(
            f"This machine can promise to find a phase that is slower by {promised.slowdown:.0%}, in "
            f"{promised.case_s:.0f} s a case."
        )
    else:
        tell(f"This machine can promise no slowdown up to {SLOWDOWNS[-1]:.0%}: it is too noisy for these cases.")
    return SelfTest(
        num_cases=len(sweep.cases),
        num_quantities=len(clean),
        not_measured=not_measured,
        false_alarms=alarms,
        num_held_found=num_held_found,
        slowed=slowed,
        rates=simulated,
        promised=promised,
    )


def _elsewhere(false_alarms: float | None, form: str) -> str:
    return "" if false_alarms is None else f", false alarms elsewhere {false_alarms:{form}}"


def held_tensor(case: Case) -> dict[str, Any]:
    """The fault of a tensor of ``HELD_BYTES`` that is held over a step, in any case."""
    return {"held_bytes": HELD_BYTES}


def slower_phase(phases: Mapping[str, str], share: float) -> Fault:
    """Returns the fault that makes one phase of each case slower by ``share``; ``phases`` has it by the case's id."""
    return lambda case: {"phase": phases.get(case.id), "share": share}


def found_and_open(findings: Sequence[Finding], affected: Mapping[str, Set[str]]) -> tuple[int, int]:
    """Returns in how many cases a slower phase was found, and in how many others something is ambiguous.

    Args:
        findings: Of all cases.
        affected: By the case's id, the times that the phase is part of. Another that is slower is a false alarm.
    """
    slower = [found for found in findings if found.verdict == "slower"]
    cases = {found.case.id for found in slower if found.quantity in affected.get(found.case.id, ())}
    return len(cases), len({found.case.id for found in findings if found.verdict == "ambiguous"} - cases)


def _num_cases(findings: Sequence[Finding], verdict: Verdict) -> int:
    return len({found.case.id for found in findings if found.verdict == verdict})
