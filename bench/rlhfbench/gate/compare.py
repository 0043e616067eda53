"""Runs base and head of every case in pairs of blocks, until the answer is clear or the time is spent.

The first pair of a case measures memory, one side after the other. In each later pair both sides live at once, in fresh
processes, and take their steps in turns: what disturbs one step of the base most likely disturbs the head's next to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from rlhfbench.cases.preflight import check
from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import ForkServerError
from rlhfbench.gate.decide import MAX_LOOKS, MIN_PAIRS, PAIRS_PER_LOOK, Effects, Levels, share_done
from rlhfbench.gate.findings import Finding, failure, findings_of, not_compared
from rlhfbench.gate.sides import Side, temporary_folder
from rlhfbench.measure.host import available_bytes
from rlhfbench.measure.turns import run_in_turns
from rlhfbench.processes import num_cores
from rlhfbench.records.derived import at
from rlhfbench.records.file import Record, RecordsFile
from rlhfbench.runs.case_process import ThisMachine
from rlhfbench.runs.case_runner import Runner
from rlhfbench.runs.folder import RunFolder
from rlhfbench.runs.forkserver import WARM, ForkServer
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.progress import Silent
from rlhfkernels.config.case import Case

# Both sides live at once only if they take less than this share of the memory that is free.
_MAX_SHARE_OF_MEMORY = 0.7
# Of the first pair, which measures memory: a step to warm up and two more.
_SHORTEST_S = 0.01
_MAX_TURNS_S = 3.0
CHANGES = ("slower", "faster", "larger", "smaller")
Tell = Callable[[str], None]
# Returns the fault that is put into the step of a case: see ``rlhfbench.measure.injection``.
Fault = Callable[[Case], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GateOptions:
    """Options of a gate.

    Attributes:
        effects: What counts as a change, and what ``same`` excludes.
        budget_s: Seconds of a case, over both sides, after which no more pairs are timed. Four pairs always are.
        pair_s: Seconds of timed steps of a pair, over both sides; ``None`` is a twentieth of the budget, at most 3 s.
        num_threads: torch's threads in each case; ``None`` is one per physical core, with at least one core left free.
        step: ``module:function`` of the user's own step; ``None`` for the methods of this package.
        case_timeout_s: Seconds after which a process is killed.
    """

    effects: Effects = dataclasses.field(default_factory=Effects)
    budget_s: float = 60.0
    pair_s: float | None = None
    num_threads: int | None = None
    step: str | None = None
    case_timeout_s: float = 600.0

    @property
    def turns_s(self) -> float:
        """Seconds of timed steps of a pair.

        Starting both sides takes about a second, so longer pairs waste less; more pairs make the interval narrower.
        The 99.95 % quantile of Student's t falls from 5.4 with 8 pairs to 4.2 with 14, for which 3 s leave room.
        """
        return min(_MAX_TURNS_S, self.budget_s / 20) if self.pair_s is None else self.pair_s

    @property
    def turn_timeout_s(self) -> float:
        """Seconds of one turn: a step that hangs is killed after ``case_timeout_s``, and the other side not with it."""
        return self.case_timeout_s / 4


class Timed:
    """The runs of one side: starts its processes and keeps its records."""

    def __init__(
        self,
        side: Side,
        folder: Path,
        sweep: Sweep,
        options: GateOptions,
        opened: contextlib.ExitStack,
        fault: Fault | None = None,
    ) -> None:
        self.side = side
        run_folder = RunFolder(folder)
        run_folder.prepare(sweep, resume=False)
        self.records = opened.enter_context(RecordsFile(folder))
        self._server = ForkServer(paths=side.paths, optional=WARM)
        opened.callback(self._server.close)
        self._block_s = options.turns_s / 2
        run_options = RunOptions(
            blocks=1,
            time_budget_s=_SHORTEST_S,
            num_threads=options.num_threads or default_threads(),
            case_timeout_s=options.case_timeout_s,
        )
        step = {"step": options.step} if options.step else {}

        def settings(case: Case) -> dict[str, Any]:
            return step if fault is None else {**step, "injected": dict(fault(case))}

        self._runner = Runner(
            run_folder, run_options, self.records, ThisMachine(self._server), Silent(), extra_settings=settings
        )

    def start(self) -> str | None:
        """Starts the process that cases are forked from; returns why it did not start."""
        if self.side.obstacle is None:
            try:
                self._server.start()
            except ForkServerError as error:
                return str(error)
        return self.side.obstacle

    def restart(self) -> None:
        """Starts the process that cases are forked from anew, with another layout of its memory.

        Raises:
            ForkServerError: it did not start.
        """
        self._server.close()
        self._server.start()

    def measure_memory(self, case: Case) -> None:
        """Measures the first block of ``case``."""
        self._runner.run([case])

    def block(self, case: Case, turns: str | None = None) -> None:
        """Times one more block of ``case``, in turns with another process if there is a referee."""
        # Absent and not None without a referee: an older revision does not know the field.
        settings = {"time_budget_s": self._block_s, **({"turns": turns} if turns else {})}
        self._runner.add_block(case, settings)

    def kill(self) -> None:
        """Kills a case that runs."""
        self._server.kill()

    def records_by_case(self) -> dict[str, Record]:
        """The records by the case's id, read from the file."""
        return {record["case"]["id"]: record for record in self.records.records}


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

    Attributes:
        spent_s: Seconds spent on each case, by its id.
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
        self._sides, self._out, self._options = (base, head), out, options
        self._sweep = sweep.absolute()
        self._tell, self._random = tell, random.Random(seed)
        self.spent_s: dict[str, float] = {case.id: 0.0 for case in self._sweep.cases}

    def run(self, fault: Fault | None = None) -> list[Finding]:
        """Times pairs until every case is decided or its time is spent, and returns the findings of all cases.

        Args:
            fault: Put into the head's step.
        """
        if self._options.step is None:
            check(self._sweep)
        sweep = self._sweep
        with contextlib.ExitStack() as opened:
            folder = opened.enter_context(temporary_folder(for_sockets=True))
            both = [
                Timed(side, self._out / side.name, sweep, self._options, opened, own)
                for side, own in zip(self._sides, (None, fault), strict=True)
            ]
            begun_s = time.monotonic()
            obstacles = [timed.start() for timed in both]
            if any(obstacles):
                return [not_compared(case, *obstacles) for case in sweep.cases]
            start_s = time.monotonic() - begun_s
            self._measure_memory(both, sweep.cases)
            ready_s = time.monotonic()
            undecided = list(sweep.cases)
            findings: list[Finding] = []
            levels = Levels()
            for look in range(1, MAX_LOOKS + 1):
                for _ in range(MIN_PAIRS if look == 1 else PAIRS_PER_LOOK):
                    begun_s = time.monotonic()
                    if are_due(begun_s - ready_s, start_s):
                        with ThreadPoolExecutor(len(both)) as pool:
                            list(pool.map(Timed.restart, both))
                        ready_s = time.monotonic()
                        start_s = ready_s - begun_s
                    self._time_pairs(both, undecided, folder)
                least_s = min((self.spent_s[case.id] for case in undecided), default=self._options.budget_s)
                share = share_done(look, least_s, self._options.budget_s)
                findings = self._judge(both, findings, levels.take(share))
                undecided = self._undecided(findings)
                if not undecided:
                    # The case that took longest may be decided before the level is spent: the others get the rest.
                    findings = self._judge(both, findings, levels.take(1.0))
                num_pairs = max((found.estimate.num_pairs for found in findings if found.estimate), default=0)
                num_ambiguous = len({found.case.id for found in findings if found.verdict == "ambiguous"})
                self._tell(f"{num_pairs} pairs: {num_ambiguous} of {len(sweep.cases)} cases are ambiguous")
                if not undecided:
                    break
            return findings

    def _judge(self, both: Sequence[Timed], before: Sequence[Finding], level: float) -> list[Finding]:
        """Judges all cases at this look; changes that were found before it stand."""
        base, head = (timed.records_by_case() for timed in both)
        found = findings_of(self._sweep.cases, base, head, self._options.effects, level)
        return _with_changes_of(before, found)

    def _undecided(self, findings: Sequence[Finding]) -> list[Case]:
        """The cases that more pairs may decide, and that have time left."""
        ids = {f.case.id for f in findings if f.verdict == "ambiguous" and not f.is_memory}
        return [c for c in self._sweep.cases if c.id in ids and self.spent_s[c.id] < self._options.budget_s]

    def _measure_memory(self, both: Sequence[Timed], cases: Sequence[Case]) -> None:
        """Measures the memory of both sides of every case, one after the other in random order."""
        for case in self._random.sample(cases, len(cases)):
            with self._spending(case):
                for timed in self._random.sample(both, 2):
                    timed.measure_memory(case)

    def _time_pairs(self, both: Sequence[Timed], cases: Sequence[Case], folder: Path) -> None:
        """Times a pair of every case, in random order."""
        earlier = [timed.records_by_case() for timed in both]
        for case in self._random.sample(cases, len(cases)):
            records = [side.get(case.id) for side in earlier]
            if any(failure(record) for record in records):
                continue  # it cannot be compared any more
            if all(timed.side.takes_turns for timed in both) and fit_at_once(case, records):
                jobs = [functools.partial(timed.block, case) for timed in both]
                aborts = [timed.kill for timed in both]
                cores = shared_cores(case, records)
                with self._spending(case):
                    run_in_turns(
                        jobs, folder, self._options.turns_s, self._random, aborts, cores, self._options.turn_timeout_s
                    )
            else:
                with self._spending(case):
                    for timed in self._random.sample(both, 2):
                        timed.block(case)

    @contextlib.contextmanager
    def _spending(self, case: Case) -> Iterator[None]:
        """Counts the time of the block as spent on ``case``."""
        started_s = time.monotonic()
        yield
        self.spent_s[case.id] += time.monotonic() - started_s


def _with_changes_of(before: Sequence[Finding], now: Sequence[Finding]) -> list[Finding]:
    """The findings of this look, but for changes that an earlier one found.

    A level is spent once: without this, the smaller levels of later looks would take back what a larger one allowed.
    A change stands also where its case has failed since, and is compared no more.
    """
    changes = {(f.case.id, f.quantity): f for f in before if f.verdict in CHANGES}
    kept = [changes.pop((found.case.id, found.quantity), found) for found in now]
    return [*kept, *changes.values()]


def are_due(lived_s: float, start_s: float) -> bool:
    """Tells whether both sides' servers are to be started anew before the next pair of every case.

    Processes of one server share the layout of its memory, which can make a side faster as long as the server lives.
    Of 104 times that had not changed, 19 had a 95 % interval without 1 where servers lived as long as the gate; in one
    gate the updates of three methods were 2 to 4 % slower. So each pair of a case should have servers of its own,
    except where starting them, 2 to 5 s, takes longer than the pairs.

    Args:
        lived_s: Seconds since they were ready.
        start_s: Seconds that starting them took.
    """
    return lived_s >= start_s


def default_threads() -> int | None:
    """Returns the threads of a case: one core is left to the rest of the machine.

    An op waits for the slowest of its threads, so with a thread on every core whatever else runs delays every op.
    ``None`` leaves torch's choice, where ``OMP_NUM_THREADS`` says how many.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, min(psutil.cpu_count(logical=False) or 1, num_cores() - 1))


def shared_cores(case: Case, records: Sequence[Record | None]) -> int | None:
    """Returns the cores that both sides of a pair share, one for each thread; ``None`` leaves both to the scheduler.

    A referee meets one process of a side, and would bind that one alone where a side has several.
    """
    threads = [at(record, "num_threads") for record in records]
    return None if case.options.parallel.world_size > 1 or None in threads else max(threads)


def fit_at_once(case: Case, records: Sequence[Record | None]) -> bool:
    """True if both sides may live at once: the memory that each takes is known, and what is free holds both.

    On a GPU they do not: two contexts share its memory and its caches.
    """
    of_a_rank = [at(record, "memory.views.host_peak_bytes") for record in records]
    if case.device != "cpu" or None in of_a_rank:
        return False
    needed: int = case.options.parallel.world_size * sum(of_a_rank)
    return needed < _MAX_SHARE_OF_MEMORY * available_bytes()
