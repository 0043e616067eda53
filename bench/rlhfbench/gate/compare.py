"""Runs base and head of every case in alternating blocks, until the answer is clear or the time is spent."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhfbench.cases.preflight import check
from rlhfbench.cases.sweep import Sweep
from rlhfbench.gate.decide import (
    MIN_PAIRS,
    Effects,
    Estimate,
    Verdict,
    counted_pairs,
    estimate,
    judge,
    judge_memory,
    level_of_look,
)
from rlhfbench.gate.sides import Side
from rlhfbench.measure.interference import MAX_OTHER_CPU_SHARE
from rlhfbench.records.blocks import block_values, load_of
from rlhfbench.records.file import Record, RecordsFile
from rlhfbench.records.schema import at
from rlhfbench.runs.folder import RunFolder
from rlhfbench.runs.forkserver import ForkServer
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.progress import Silent
from rlhfbench.runs.runner import Runner
from rlhfkernels.config.case import Case

# Looks at the data: after the first MIN_PAIRS pairs of every undecided case, then after every second one more.
MAX_LOOKS = 8
PAIRS_PER_LOOK = 2
Tell = Callable[[str], None]
RecordOf = Callable[[Case], "Record | None"]
_SIZES = ("total_bytes", "model_bytes", "activation_bytes", "rollout_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GateOptions:
    """Options of a gate.

    Attributes:
        effects: What counts as a change, and what ``same`` excludes.
        budget_s: Seconds of a case, over both sides, after which no more pairs are timed.
        block_s: Seconds for warming up and timing one block.
        num_threads: torch's threads in each case; ``None`` leaves torch's choice.
        step: ``module:function`` of the user's own step; ``None`` for the methods of this package.
        case_timeout_s: Seconds after which a process is killed.
    """

    effects: Effects = dataclasses.field(default_factory=Effects)
    budget_s: float = 60.0
    block_s: float = 0.4
    num_threads: int | None = None
    step: str | None = None
    case_timeout_s: float = 600.0


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
        reason: Why a case was not compared.
    """

    case: Case
    quantity: str
    verdict: Verdict
    base: float | None = None
    head: float | None = None
    estimate: Estimate | None = None
    reason: str | None = None


class Timed:
    """The runs of one side: starts its processes and keeps its records."""

    def __init__(
        self,
        side: Side,
        folder: Path,
        sweep: Sweep,
        options: GateOptions,
        opened: contextlib.ExitStack,
        injected: Mapping[str, Any] | None = None,
    ) -> None:
        self.side = side
        run_folder = RunFolder(folder)
        run_folder.prepare(sweep, resume=False)
        self.records = opened.enter_context(RecordsFile(folder))
        server = ForkServer(paths=side.paths)
        opened.callback(server.close)
        run_options = RunOptions(
            blocks=1,
            time_budget_s=options.block_s,
            num_threads=options.num_threads,
            case_timeout_s=options.case_timeout_s,
        )
        extra = {
            **({"step": options.step} if options.step else {}),
            **({} if injected is None else {"injected": dict(injected)}),
        }
        self._runner = Runner(run_folder, run_options, self.records, server, Silent(), extra_settings=extra)

    def block(self, case: Case) -> Record:
        """Times one more block of ``case`` and returns its record."""
        record = self.record(case)
        if record is None:
            self._runner.run([case])
        else:
            self._runner.add_block(case, record)
        found = self.record(case)
        assert found is not None
        return found

    def record(self, case: Case) -> Record | None:
        """The record of ``case``; ``None`` before its first block."""
        return next((r for r in self.records.records if r["case"]["id"] == case.id), None)


class Comparison:
    """Compares two sides over a sweep.

    Args:
        base: The side to compare with.
        head: The side that may have changed.
        sweep: The cases.
        out: Folder for the runs of both sides.
        options: How to compare.
        tell: Receives a line after each look at the data.
        seed: Of the order in which pairs are timed.
    """

    def __init__(
        self,
        base: Side,
        head: Side,
        sweep: Sweep,
        out: Path,
        options: GateOptions,
        tell: Tell = lambda line: None,
        *,
        seed: int = 0,
    ) -> None:
        self._sides, self._sweep, self._out, self._options = (base, head), sweep, out, options
        self._tell, self._random = tell, random.Random(seed)
        self._spent_s: dict[str, float] = {case.id: 0.0 for case in sweep.cases}

    def run(self, injected: Mapping[str, Any] | None = None) -> list[Finding]:
        """Times pairs until every case is decided or its time is spent, and returns the findings of all cases.

        Args:
            injected: A fault put into the head's step: see ``rlhfbench.measure.injection``.
        """
        if self._options.step is None:
            check(self._sweep)
        sweep = self._sweep.absolute()
        with contextlib.ExitStack() as opened:
            both = [
                Timed(side, self._out / side.name, sweep, self._options, opened, fault)
                for side, fault in zip(self._sides, (None, injected), strict=True)
            ]
            undecided = list(sweep.cases)
            findings: list[Finding] = []
            for num_new, level in looks():
                for _ in range(num_new):
                    self._time_pairs(both, undecided)
                findings = findings_of(sweep.cases, both[0].record, both[1].record, self._options.effects, level)
                ids = {found.case.id for found in findings if found.verdict == "ambiguous"}
                undecided = [c for c in sweep.cases if c.id in ids and self._spent_s[c.id] < self._options.budget_s]
                spent = [found.estimate.num_pairs for found in findings if found.estimate is not None]
                self._tell(f"{max(spent, default=0)} pairs: {len(ids)} of {len(sweep.cases)} cases are ambiguous")
                if not undecided:
                    break
            return findings

    def _time_pairs(self, both: Sequence[Timed], cases: Sequence[Case]) -> None:
        """Times a pair of every case, in random order, each pair's sides one after the other in random order."""
        for case in self._random.sample(cases, len(cases)):
            started_s = time.monotonic()
            first = both[0].record(case), both[1].record(case)
            if any(record is not None and record["outcome"] != "ok" for record in first):
                continue  # nothing to pair with
            for timed in self._random.sample(both, 2):
                timed.block(case)
            self._spent_s[case.id] += time.monotonic() - started_s


def looks() -> Iterator[tuple[int, float]]:
    """Yields for each look at the data how many pairs come before it, and the significance level that it may spend."""
    for look in range(1, MAX_LOOKS + 1):
        yield MIN_PAIRS if look == 1 else PAIRS_PER_LOOK, level_of_look(look, MAX_LOOKS)


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
    times: list[tuple[Case, str, float, float, Estimate]] = []
    for case in cases:
        base, head = base_of(case), head_of(case)
        problem = _problem(base, head)
        if problem is not None or base is None or head is None:
            assert problem is not None
            findings.append(Finding(case=case, quantity="", verdict=problem[0], reason=problem[1]))
            continue
        times += _times(case, base, head)
        findings += _sizes(case, base, head)
    verdicts = judge([found for *_, found in times], level, effects)
    for (case, quantity, base_s, head_s, found), verdict in zip(times, verdicts, strict=True):
        findings.append(
            Finding(case=case, quantity=quantity, verdict=verdict, base=base_s, head=head_s, estimate=found)
        )
    return findings


def _problem(base: Record | None, head: Record | None) -> tuple[Verdict, str] | None:
    """Why a case cannot be compared; ``None`` if both sides measured it."""
    for name, record in (("base", base), ("head", head)):
        if record is None:
            return "missing", f"the {name} has no record of it."
        if record["outcome"] != "ok":
            error = record["error"] or {}
            return "failed", f"{name}: {record['outcome']}: {error.get('message') or 'no message.'}"
    return None


def _times(case: Case, base: Record, head: Record) -> Iterator[tuple[Case, str, float, float, Estimate]]:
    """Yields every time that both sides have, as the means of the pairs that count."""
    counted = counted_pairs(list(zip(_loads(base), _loads(head), strict=False)), MAX_OTHER_CPU_SHARE)
    pairs = [
        (b, h)
        for b, h, counts in zip(block_values(base), block_values(head), counted, strict=False)
        if counts and b is not None and h is not None
    ]
    if len(pairs) < 2:
        return
    for name in [name for name in pairs[0][0] if name in pairs[0][1]]:
        seconds = [(b[name], h[name]) for b, h in pairs]
        if all(b > 0 and h > 0 for b, h in seconds):
            base_s, head_s = (sum(side) / len(side) for side in zip(*seconds, strict=True))
            yield case, f"{name} s", base_s, head_s, estimate([math.log(h / b) for b, h in seconds])


def _loads(record: Record) -> list[float]:
    return [load_of(block.get("interference") or {}) for block in record["latency"]["blocks"] or ()]


def _sizes(case: Case, base: Record, head: Record) -> Iterator[Finding]:
    """The findings on memory: totals, and every part at the step's highest total."""
    paths = [f"memory.{name}" for name in _SIZES]
    paths += [f"memory.parts.{part}" for part in at(base, "memory.parts") or {}]
    paths += [f"memory.phases.{phase}.total_bytes" for phase in at(base, "memory.phases") or {}]
    for path in paths:
        sizes = at(base, path), at(head, path)
        if None not in sizes:
            name = path.removeprefix("memory.").removeprefix("parts.").removeprefix("phases.").removesuffix("_bytes")
            name = name.removesuffix(".total")
            yield Finding(
                case=case, quantity=f"memory {name}", verdict=judge_memory(*sizes), base=sizes[0], head=sizes[1]
            )
