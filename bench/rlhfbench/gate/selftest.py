"""The self-test: what the gate can promise on this machine.

Pairs of a revision with itself are measured, and comparisons simulated from them. Real comparisons with a fault in the
step stand beside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path

from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import GateError
from rlhfbench.gate.compare import CHANGES, Comparison, Fault, GateOptions
from rlhfbench.gate.decide import Effects, Verdict
from rlhfbench.gate.findings import Finding
from rlhfbench.gate.sides import Side
from rlhfbench.gate.simulation import Rates, measured_cases, rates
from rlhfbench.runs.titles import Titles

SLOWDOWNS = (0.02, 0.05, 0.10, 0.20)
HELD_BYTES = 64 * 1024
_PROMISED_SHARE = 0.95  # of the tries in which an effect must be found to be promised


def self_test(side: Side, sweep: Sweep, out: Path, options: GateOptions, tell: Callable[[str], None]) -> list[Rates]:
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
    for failed in [found for found in clean if found.verdict == "failed"]:
        tell(f"{titles(failed.case)} could not be measured: {failed.reason}")
    alarms = [found for found in clean if found.verdict in CHANGES]
    tell(f"itself: {len(alarms)} false alarms in {len(sweep.cases)} cases, {len(clean)} quantities")
    for alarm in alarms:
        tell(f"    {titles(alarm.case)}: {alarm.quantity} {alarm.verdict}, {alarm.shown_ratio}")
    held = Comparison(base, head, sweep, out / "held", options).run(lambda case: {"held_bytes": HELD_BYTES})
    tell(f"{HELD_BYTES} bytes held over a step: found in {_num_cases(held, 'larger')} of {len(sweep.cases)} cases")
    phases = {case.case_id: case.longest_phase for case in cases}
    affected = {case.case_id: {f"{name} s" for name in case.affected(case.longest_phase)} for case in cases}
    for slowdown in SLOWDOWNS:
        slower = Comparison(base, head, sweep, out / f"slower-{slowdown:g}", options).run(
            slower_phase(phases, slowdown)
        )
        num_found, num_open = found_and_open(slower, affected)
        told = f"{num_found} of {len(sweep.cases)} cases, cannot tell {num_open}"
        tell(f"the longest phase slower by {slowdown:.0%}, measured: found in {told}")
    found = [rates(cases, slowdown, options.effects, options.budget_s) for slowdown in (0.0, *SLOWDOWNS)]
    for row in found:
        elsewhere = f", false alarms elsewhere {row.false_alarms:.2%}" if len(cases) > 1 else ""
        tell(
            f"one phase slower by {row.slowdown:.0%}, simulated: found {row.found:.0%}, cannot tell {row.ambiguous:.0%}"
            f"{elsewhere}, {row.num_pairs:.1f} pairs and {row.case_s:.0f} s a case"
        )
        for name, (detected, alarmed) in row.others.items():
            tell(f"    {name}: found {detected:.0%}" + (f", false alarms elsewhere {alarmed:.0%}" if elsewhere else ""))
    promised = [row for row in found if row.slowdown and row.found >= _PROMISED_SHARE]
    if promised:
        first = promised[0]
        tell(
            f"This machine can promise to find a phase that is slower by {first.slowdown:.0%}, in {first.case_s:.0f} s "
            "a case."
        )
    else:
        tell(f"This machine can promise no slowdown up to {SLOWDOWNS[-1]:.0%}: it is too noisy for these cases.")
    return found


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
