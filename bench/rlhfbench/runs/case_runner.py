"""Runs cases through an executor, and records the outcome of each."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from rlhfbench.errors import ForkServerError
from rlhfbench.records.derived import at
from rlhfbench.records.file import Entry, Record, RecordsFile, make_record
from rlhfbench.records.timelines import planned, write_timeline
from rlhfbench.runs import environment
from rlhfbench.runs.conditions import Conditions
from rlhfbench.runs.execution import Ended, Executor, Task
from rlhfbench.runs.folder import RunFolder, Segment
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.progress import Progress
from rlhfbench.runs.titles import Titles
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options

_AXES = ("prompt_len", "completion_len", "batch_size")


class Runner:
    """Runs cases through an executor and records each.

    Args:
        folder: receives logs, traces and timelines.
        options: how the cases are run.
        records: receive a record per case.
        executor: runs the cases. The caller closes it.
        progress: receives what happens.
        segment: of the run, which records name.
        retry: outcomes of recorded cases that are run again, once. With ``oom``, cases that were skipped because a
            smaller one was out of memory are run again too.
        extra_settings: called with a case, returns further fields of ``MeasurementOptions`` for it.

    Attributes:
        memory_limit_bytes: bytes that a case may allocate; at first those of ``options``.
    """

    def __init__(
        self,
        folder: RunFolder,
        options: RunOptions,
        records: RecordsFile,
        executor: Executor,
        progress: Progress,
        *,
        segment: Segment | None = None,
        retry: Collection[str] = (),
        extra_settings: Callable[[Case], Mapping[str, Any]] = lambda case: {},
        title: Titles | None = None,
    ) -> None:
        self._segment = segment
        self._extra_settings = extra_settings
        self._conditions = Conditions(folder, segment)
        retry = {*retry, "skipped"} if "oom" in retry else retry
        self._retried = {entry.case_id for entry in records.entries.values() if entry.outcome in retry}
        self._folder, self._options, self._records = folder, options, records
        self._executor, self._progress, self._title = executor, progress, title or Titles()
        self.memory_limit_bytes = options.memory_limit_bytes
        self._round_s = 0.0  # of the round that has ended

    def run_missing(self, cases: Iterable[Case]) -> None:
        """Runs and records those of ``cases`` that have no record yet, then times their later blocks."""
        cases = list(cases)
        recorded = {entry.case_id for entry in self._recorded()}
        missing = [case for case in cases if case.id not in recorded]
        if missing:
            self._progress.begin(missing, len(recorded))
            self.run(missing)
        self.run_blocks(cases)

    def run_blocks(self, cases: Sequence[Case]) -> None:
        """Times the blocks that the records of ``cases`` lack: one of every case, in random order, then the next.

        So the blocks of a case lie apart, and what changes during the run changes all cases alike. Blocks of different
        machines or conditions are never mixed.
        """
        ids = {case.id: case for case in cases}
        lacking = [entry for entry in self._recorded() if entry.case_id in ids and self._lacks_blocks(entry)]
        num_kept = sum(not self._is_as_it_was(entry) for entry in lacking)
        if num_kept:
            self._progress.notice(
                f"No further blocks are timed for {num_kept} {'case' if num_kept == 1 else 'cases'}: measured under "
                "other conditions, or on a machine that is not here."
            )
        lost = set[str]()  # cases whose machine died, which lack blocks for good
        while True:
            missing = [entry for entry in lacking if entry.case_id not in lost]
            missing = [entry for entry in missing if self._lacks_blocks(entry) and self._is_as_it_was(entry)]
            if not missing:
                return
            number = min(entry.num_blocks for entry in missing)
            behind = [entry for entry in missing if entry.num_blocks == number]
            random.Random(f"{self._segment.run_id if self._segment else ''} {number}").shuffle(behind)
            try:
                self._executor.start(round_s=self._round_s)
            except ForkServerError as error:
                if self._round_s == 0:
                    raise
                self._progress.notice(f"No further blocks are timed: {error}")
                return
            started_s = time.monotonic()
            self._progress.begin_blocks(number, max(map(self._num_blocks, missing)), len(behind))
            hosts = {entry.case_id: entry.host for entry in behind}
            for ended in self._executor.run([ids[entry.case_id] for entry in behind], self._start_block, hosts):
                if ended.is_lost:
                    lost.add(ended.task.case.id)
                self._record_block(ended)
            self._round_s = time.monotonic() - started_s

    def _num_blocks(self, entry: Entry) -> int:
        """Blocks that the case of ``entry`` is timed in. A resumed run may ask for other than its start did."""
        return self._options.blocks or entry.num_blocks_asked

    def _lacks_blocks(self, entry: Entry) -> bool:
        """True if the case of ``entry`` has fewer blocks than it is timed in."""
        return entry.outcome == "ok" and 0 < entry.num_blocks < self._num_blocks(entry)

    def _is_as_it_was(self, entry: Entry) -> bool:
        """True if the machine of ``entry`` is here, and nothing has changed since that times or memory depend on."""
        here = self._segment is None or self._executor.can_run_on(entry.host)
        return here and self._conditions.are_alike(entry)

    def add_block(self, case: Case, settings: Mapping[str, Any] | None = None) -> None:
        """Times and records one more block of ``case``, which has a record. A block that fails has its error.

        Args:
            case: The case.
            settings: Fields of ``MeasurementOptions`` that differ for this block.
        """
        for ended in self._executor.run([case], lambda case: self._start_block(case, settings)):
            self._record_block(ended)

    def _start_block(self, case: Case, settings: Mapping[str, Any] | None = None) -> Task:
        entry = self._records.entries[case.id]
        self._progress.start_block(case)
        return self._task(case, entry.num_blocks, self._num_blocks(entry), settings)

    def _record_block(self, ended: Ended) -> None:
        """Records a block. One whose machine died is not recorded: a resumed run times it."""
        case, result = ended.task.case, ended.result
        block = result.get("block") or {"error": {"outcome": result["outcome"], **(result["error"] or {})}}
        if not ended.is_lost:
            self._records.append_block(case.id, block)
        self._progress.finish_block(case, block)

    def run(self, cases: Iterable[Case], num_blocks: int | None = None) -> None:
        """Runs and records ``cases``; skips one that is no smaller than a case that was out of memory.

        Args:
            cases: the cases.
            num_blocks: blocks of each; by default those of the options.
        """
        self._executor.start()
        started_s = time.monotonic()
        failed = self._out_of_memory()
        smaller: dict[str, Case] = {}

        def start(case: Case) -> Task | None:
            self._progress.start_case(case)
            found = next((other for other in failed if dominates(case, other)), None)
            if found is None:
                return self._task(case, 0, num_blocks or self._options.blocks)
            if self._options.with_plan:
                smaller[case.id] = found
                return dataclasses.replace(self._task(case, 0, None), request=None)
            self._progress.finish_case(case, self._append(_skipped(case, found)))
            return None

        for ended in self._executor.run(list(cases), start):
            case = ended.task.case
            found = smaller.pop(case.id, None)
            record = self._append(self._record(ended) if found is None else _skipped(case, found), ended)
            if record["outcome"] == "oom":
                failed.append(case)
            self._progress.finish_case(case, record)
        self._round_s = time.monotonic() - started_s

    def _out_of_memory(self) -> list[Case]:
        """The recorded cases that were out of memory and would be again: under the same conditions and limit."""
        return [
            Case.from_dict(entry.oom_case)
            for entry in self._recorded()
            if entry.oom_case is not None and self._conditions.limit_is_same(entry) and self._is_as_it_was(entry)
        ]

    def try_case(self, case: Case) -> Record:
        """Runs and records ``case``, or returns its record of an earlier try under the same conditions and limit."""
        tried = (entry for entry in self._recorded() if entry.case_id == case.id)
        if not any(self._conditions.limit_is_same(entry) and self._is_as_it_was(entry) for entry in tried):
            self._executor.start()
            self._progress.start_case(case)
            # A try asks whether it fits: it gets no interval.
            (ended,) = self._executor.run([case], lambda case: self._task(case, 0, 1))
            record = self._append(self._record(ended), ended)
            self._progress.notice(f"{self._title(case)} {record['outcome']} {record['wall_s']:.1f} s")
            return record
        return next(record for record in self._records.records if record["case"]["id"] == case.id)

    def _recorded(self) -> list[Entry]:
        """The records that stand: those of cases to be run again are left out."""
        return [entry for entry in self._records.entries.values() if entry.case_id not in self._retried]

    def _append(self, record: Record, ended: Ended | None = None) -> Record:
        """Records ``record``, with the plan and the machine of ``ended``."""
        record["plan"] = None if ended is None or ended.plan is None else dict(ended.plan)
        if ended is not None and ended.plan_timeline is not None:
            write_timeline(self._folder.timelines_dir, planned(record["case"]["id"]), dict(ended.plan_timeline))
        if self._segment is not None:
            record["run"] = self._segment.to_dict()
            if ended is not None and ended.host is not None:
                record["run"]["host"] = ended.host
        self._records.append(record)
        self._retried.discard(record["case"]["id"])
        return record

    def _record(self, ended: Ended) -> Record:
        """The record of a case that ended, which is not appended yet."""
        case, result = ended.task.case, dict(ended.result)
        if result.get("timeline"):
            write_timeline(self._folder.timelines_dir, case.id, result["timeline"])
        record = make_record(
            case,
            outcome=result["outcome"],
            error=result["error"],
            measured=result,
            started_at=ended.started_at,
            wall_s=ended.wall_s,
        )
        views = record["memory"]["views"]
        # The driver is asked for the process of rank 0, and the other views are those of the worst rank.
        views["driver_peak_bytes"] = ended.driver_peak_bytes if not at(record, "world.worst_rank") else None
        if views["host_peak_bytes"] is None:
            views["host_peak_bytes"] = ended.max_rss_bytes
        return record

    def _task(self, case: Case, block: int, num_blocks: int | None, settings: Mapping[str, Any] | None = None) -> Task:
        """The task of one block of ``case``. Its memory is predicted beside the first."""
        return Task(
            case=case,
            request=self._request(case, block, num_blocks, settings or {}),
            log_path=self._folder.log_path(case.id if block == 0 else f"{case.id}-block{block}"),
            timeout_s=self._options.case_timeout_s,
            with_plan=self._options.with_plan and block == 0,
        )

    def _request(self, case: Case, block: int, num_blocks: int | None, settings: Mapping[str, Any]) -> dict[str, Any]:
        options = self._options
        trace_dir = str((self._folder.traces_dir / case.id).absolute()) if options.profile and block == 0 else None
        return {
            "case": _compact(case),
            "memory_limit_bytes": self.memory_limit_bytes,
            "settings": {
                "time_budget_s": options.time_budget_s,
                "precision": options.precision,
                "num_threads": options.num_threads,
                "profile_dir": trace_dir,
                "timeline": block == 0,
                "block": block,
                "num_blocks": num_blocks,
                **self._extra_settings(case),
                **settings,
            },
        }


def dominates(case: Case, other: Case) -> bool:
    """True if ``case`` equals ``other`` but for the seed, and lengths, batch size and LoRA rank that are no smaller."""
    options = case.options.replace({"lora.r": other.options.lora.r})
    axes = {axis: getattr(other, axis) for axis in _AXES}
    same = dataclasses.replace(case, seed=other.seed, options=options, **axes)
    larger = all(getattr(case, axis) >= getattr(other, axis) for axis in _AXES)
    return same == other and larger and case.options.lora.r >= other.options.lora.r


def _compact(case: Case) -> dict[str, Any]:
    """``case`` with the options that differ from the defaults: a process with other code may not know the rest."""
    defaults, groups = Options().flat(), dict[str, dict[str, Any]]()
    for name, value in case.options.flat().items():
        if value != defaults[name]:
            group, _, field = name.partition(".")
            groups.setdefault(group, {})[field] = value
    return {**case.to_dict(), "options": groups}


def _skipped(case: Case, smaller: Case) -> Record:
    message = (
        f"case {smaller.id} ({smaller.prompt_len} + {smaller.completion_len} tokens, "
        f"batch {smaller.batch_size}, rank {smaller.options.lora.r}) is no larger, and was out of memory."
    )
    error = {"kind": "Dominates", "message": message, "phase": None}
    return make_record(case, outcome="skipped", error=error, measured={}, started_at=environment.now(), wall_s=0.0)
