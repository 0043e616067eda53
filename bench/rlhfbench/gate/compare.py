"""Runs base and head of every case in alternating blocks, until the answer is clear or the time is spent."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhfbench.cases.preflight import check
from rlhfbench.cases.sweep import Sweep
from rlhfbench.gate.decide import MIN_PAIRS, Effects, Levels
from rlhfbench.gate.findings import Finding, failure, findings_of
from rlhfbench.gate.sides import Side
from rlhfbench.records.file import Record, RecordsFile
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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GateOptions:
    """Options of a gate.

    Attributes:
        effects: What counts as a change, and what ``same`` excludes.
        budget_s: Seconds of a case, over both sides, after which no more pairs are timed. Four pairs always are.
        block_s: Seconds for warming up and timing one block. Starting and building takes about as long: with 0.4 s,
            two steps a block, the total of a pair of blocks spread by 15 to 24 % on two shared cores.
        num_threads: torch's threads in each case; ``None`` leaves torch's choice.
        step: ``module:function`` of the user's own step; ``None`` for the methods of this package.
        case_timeout_s: Seconds after which a process is killed.
    """

    effects: Effects = dataclasses.field(default_factory=Effects)
    budget_s: float = 60.0
    block_s: float = 1.0
    num_threads: int | None = None
    step: str | None = None
    case_timeout_s: float = 600.0


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
            levels = Levels()
            for look in range(1, MAX_LOOKS + 1):
                for _ in range(MIN_PAIRS if look == 1 else PAIRS_PER_LOOK):
                    self._time_pairs(both, undecided)
                share = self._share(look, undecided)
                findings = findings_of(
                    sweep.cases, both[0].record, both[1].record, self._options.effects, levels.take(share)
                )
                ids = {found.case.id for found in findings if found.verdict == "ambiguous"}
                undecided = [c for c in sweep.cases if c.id in ids and self._spent_s[c.id] < self._options.budget_s]
                spent = [found.estimate.num_pairs for found in findings if found.estimate is not None]
                self._tell(f"{max(spent, default=0)} pairs: {len(ids)} of {len(sweep.cases)} cases are ambiguous")
                if not undecided or share == 1:
                    break
            return findings

    def _share(self, look: int, undecided: Sequence[Case]) -> float:
        """The share of the comparison that is done: of its looks, or of the time of the least advanced case."""
        least_s = min((self._spent_s[case.id] for case in undecided), default=self._options.budget_s)
        return min(1.0, max(look / MAX_LOOKS, least_s / self._options.budget_s))

    def _time_pairs(self, both: Sequence[Timed], cases: Sequence[Case]) -> None:
        """Times a pair of every case, in random order, each pair's sides one after the other in random order."""
        for case in self._random.sample(cases, len(cases)):
            started_s = time.monotonic()
            if any(failure(timed.record(case)) for timed in both if timed.record(case) is not None):
                continue  # it cannot be compared any more
            for timed in self._random.sample(both, 2):
                timed.block(case)
            self._spent_s[case.id] += time.monotonic() - started_s
