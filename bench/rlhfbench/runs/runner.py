"""Runs the cases of a sweep and records the outcome of each."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from rlhfbench.cases import preflight
from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import RunFolderError
from rlhfbench.launch import find_launch
from rlhfbench.records.file import Entry, Record, RecordsFile, make_record
from rlhfbench.records.timelines import planned, write_timeline
from rlhfbench.runs import environment
from rlhfbench.runs.agents import follower, head
from rlhfbench.runs.case_process import ThisMachine
from rlhfbench.runs.execution import Ended, Executor, Place, Setup, Task
from rlhfbench.runs.folder import RunFolder, Segment
from rlhfbench.runs.forkserver import WARM, ForkServer
from rlhfbench.runs.job import Exit
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.progress import Progress, make_progress
from rlhfbench.runs.ranks import run_ranks
from rlhfbench.runs.titles import Titles
from rlhfkernels.config.case import Case
from rlhfkernels.config.content import content_hash
from rlhfkernels.config.options import Options

_AXES = ("prompt_len", "completion_len", "batch_size")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """The result of a run.

    Attributes:
        run_dir: folder of the run.
        records: one per case that was reached, in the order in which they were made.
        interrupted: Ctrl-C ended the run before its last case.
    """

    run_dir: Path
    records: list[Record]
    interrupted: bool

    @property
    def num_ok(self) -> int:
        """Number of cases that were measured."""
        return sum(record["outcome"] == "ok" for record in self.records)


def run_sweep(
    sweep: Sweep,
    out_dir: str | Path,
    options: RunOptions | None = None,
    *,
    resume: bool = False,
    retry: Collection[str] = (),
    progress: Progress | None = None,
    place: Place | None = None,
) -> RunResult:
    """Runs every case of ``sweep`` that is not recorded yet, each in a process of its own.

    In a process of torchrun or Slurm's ``srun`` that is not rank 0's, it starts this process's rank of every case that
    rank 0 runs, and returns without records when that run ends.

    Args:
        sweep: the cases, in their order.
        out_dir: folder of the run: new or empty, or with ``resume`` the folder of a run of the same sweep.
        options: how the cases are run; by default as the run to resume was, or with the defaults of ``RunOptions``.
        resume: continue the run in ``out_dir``.
        retry: outcomes whose recorded cases are run again when resumed.
        progress: receives what happens; by default it is written to standard error.
        place: executes the cases; by default this machine.

    Returns:
        The records of all cases that were reached.

    Raises:
        SweepError: this machine cannot run the sweep; every problem is named.
        RunFolderError: the folder cannot be used.
        RecordsError: the records cannot be read, or cannot be written (a full disk).
        ForkServerError: the process that cases are forked from does not start.
    """
    return run_cases(
        lambda runner, absolute: runner.run_missing(absolute.cases),
        sweep,
        out_dir,
        options,
        resume=resume,
        retry=retry,
        progress=progress,
        place=place,
    )


def run_cases(
    run: Callable[[Runner, Sweep], None],
    sweep: Sweep,
    out_dir: str | Path,
    options: RunOptions | None,
    *,
    resume: bool,
    retry: Collection[str],
    progress: Progress | None,
    max_batch_limit: int | None = None,
    place: Place | None = None,
) -> RunResult:
    """Opens the folder of a run, calls ``run`` with a runner in it, and returns what was recorded.

    Arguments and errors are those of ``run_sweep``. ``run`` chooses the cases; it receives the sweep with absolute
    paths, so that a folder can be resumed from anywhere. ``max_batch_limit`` is recorded for
    the search that resumes this one.
    """
    environment.check_system()
    launch = find_launch()
    if launch is not None and launch.rank:
        follow_launcher()
        return RunResult(run_dir=Path(out_dir), records=[], interrupted=False)
    with ExitStack() as opened:
        runs_ranks: Callable[..., Exit] = run_ranks
        if launch is not None:
            opened.callback(head().end)  # whatever becomes of this run, the other processes' ends
            runs_ranks = head().run
        how: dict[str, Any] = {"resume": resume, "retry": retry, "progress": progress, "place": place}
        return _run_cases(run, sweep, out_dir, options, max_batch_limit, runs_ranks, **how)


def follow_launcher() -> None:
    """Starts this process's rank of every case of the run that the launcher's process of rank 0 makes.

    Raises:
        SweepError: rank 0 does not answer, or is gone.
    """
    with make_server() as server:
        follower().follow(server)


def _run_cases(
    run: Callable[[Runner, Sweep], None],
    sweep: Sweep,
    out_dir: str | Path,
    options: RunOptions | None,
    max_batch_limit: int | None,
    runs_ranks: Callable[..., Exit],
    *,
    resume: bool,
    retry: Collection[str],
    progress: Progress | None,
    place: Place | None,
) -> RunResult:
    """Implements ``run_cases`` in the only process, or in that of rank 0."""
    folder = RunFolder(out_dir)
    if resume:
        folder.check_is_run()
    options = options or RunOptions.recorded(folder.settings() if resume else {})
    progress = progress or make_progress()
    facts = preflight.check(sweep, devices=place is None)
    for notice in preflight.notices(sweep):
        progress.notice(notice)
    sweep = sweep.absolute()
    folder.prepare(sweep, resume=resume)
    with RecordsFile(folder.path) as records:
        settings = {**dataclasses.asdict(options), "max_batch_limit": max_batch_limit}
        settings |= {} if place is None else place.settings
        revisions = {name: model.revision for name, model in facts.items() if model.revision is not None}
        files = dict.fromkeys(case.data_file for case in sweep.cases if case.data_file is not None)
        data_files = {file: content_hash(file) for file in files}
        earlier = folder.environments()
        environment.check_data_files(data_files, earlier)
        described: dict[str, Any] = {
            "argv": sys.argv,
            "settings": settings,
            "revisions": revisions,
            "data_files": data_files,
        }
        present = environment.describe(**described)
        changed = environment.changes(present, earlier)
        if changed is not None:
            progress.notice(changed)
        segment = folder.write_environment(present)
        interrupted = False
        try:
            types = list(dict.fromkeys(model.model_type for model in facts.values() if model.model_type))
            if place is None:
                executor: Executor = ThisMachine(make_server(types), progress, runs_ranks=runs_ranks)
            else:
                executor = place.make_executor(
                    Setup(
                        folder=folder.path,
                        cases=sweep.cases,
                        hosts={
                            entry.case_id: entry.host for entry in records.entries.values() if entry.outcome == "ok"
                        },
                        options=options,
                        model_types=types,
                        environment=described,
                        add_nodes=folder.add_nodes,
                        progress=progress,
                    )
                )
            with closing(executor):
                how: dict[str, Any] = {"segment": segment, "retry": retry, "title": Titles(sweep.cases)}
                run(Runner(folder, options, records, executor, progress, **how), sweep)
        except KeyboardInterrupt:
            interrupted = True
        except OSError as error:  # such as a folder that was removed in mid-run
            raise RunFolderError(f"out '{folder.path}' cannot be used any more: {error.strerror or error}.") from error
        finally:
            progress.end()
        return RunResult(run_dir=folder.path, records=records.records, interrupted=interrupted)


def make_server(model_types: Iterable[str] = ()) -> ForkServer:
    """The fork server of a run, not started.

    It imports the module of each architecture too, which saves half a second a case.
    """
    architectures = (f"transformers.models.{name}.modeling_{name}" for name in model_types)
    return ForkServer(optional=[*WARM, *architectures])


class Runner:
    """Runs cases through an executor and records each.

    Args:
        folder: receives logs, traces and timelines.
        options: how the cases are run.
        records: receive a record per case.
        executor: runs the cases. The caller closes it.
        progress: receives what happens.
        segment: of the run, which records name.
        retry: outcomes of recorded cases that are run again, once.
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
        self._retried = {entry.case_id for entry in records.entries.values() if entry.outcome in retry}
        self._folder, self._options, self._records = folder, options, records
        self._executor, self._progress, self._title = executor, progress, title or Titles()
        self.memory_limit_bytes = options.memory_limit_bytes

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

        So the blocks of a case lie apart, and what changes during the run changes all cases alike.
        """
        ids = {case.id: case for case in cases}
        lost = set[str]()  # cases whose machine died, which lack blocks for good
        while True:
            missing = [entry for entry in self._recorded() if entry.case_id in ids and self._lacks_blocks(entry)]
            missing = [entry for entry in missing if entry.case_id not in lost]
            if not missing:
                return
            number = min(entry.num_blocks for entry in missing)
            behind = [entry for entry in missing if entry.num_blocks == number]
            random.Random(f"{self._segment.run_id if self._segment else ''} {number}").shuffle(behind)
            self._executor.start()
            self._progress.begin_blocks(number, max(entry.num_blocks_asked for entry in missing), len(behind))
            hosts = {entry.case_id: entry.host for entry in behind}
            for ended in self._executor.run([ids[entry.case_id] for entry in behind], self._start_block, hosts):
                if ended.is_lost:
                    lost.add(ended.task.case.id)
                self._record_block(ended)

    def _lacks_blocks(self, entry: Entry) -> bool:
        """True if blocks of ``entry`` are to be timed. Blocks of different machines are never mixed."""
        here = self._segment is None or self._executor.can_run_on(entry.host)
        return here and entry.outcome == "ok" and 0 < entry.num_blocks < entry.num_blocks_asked

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
        return self._task(case, entry.num_blocks, entry.num_blocks_asked, settings)

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
        failed = [Case.from_dict(entry.oom_case) for entry in self._recorded() if entry.oom_case is not None]
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

    def try_case(self, case: Case) -> Record:
        """Runs and records ``case``, or returns its record from earlier."""
        if not any(entry.case_id == case.id for entry in self._recorded()):
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
        views["driver_peak_bytes"] = ended.driver_peak_bytes
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
