"""Runs the cases of a sweep through the fork server and records the outcome of each."""

from __future__ import annotations

import dataclasses
import random
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, Protocol

from rlhfbench.cases import preflight
from rlhfbench.cases.preflight import ModelFacts
from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import RunFolderError
from rlhfbench.processes import num_oom_kills
from rlhfbench.records.file import Record, RecordsFile, make_plan, make_record
from rlhfbench.records.timelines import write_timeline
from rlhfbench.runs import environment
from rlhfbench.runs.faults import last_line
from rlhfbench.runs.folder import RunFolder, Segment
from rlhfbench.runs.forkserver import ForkServer
from rlhfbench.runs.job import Exit
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.progress import Progress, make_progress
from rlhfbench.runs.titles import Titles
from rlhfbench.runs.worker import PHASE_PREFIX
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
) -> RunResult:
    """Runs every case of ``sweep`` that is not recorded yet, each in a process of its own.

    Args:
        sweep: the cases, in their order.
        out_dir: folder of the run: new or empty, or with ``resume`` the folder of a run of the same sweep.
        options: how the cases are run; by default as the run to resume was, or with the defaults of ``RunOptions``.
        resume: continue the run in ``out_dir``.
        retry: outcomes whose recorded cases are run again when resumed.
        progress: receives what happens; by default it is written to standard error.

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
) -> RunResult:
    """Opens the folder of a run, calls ``run`` with a runner in it, and returns what was recorded.

    Arguments and errors are those of ``run_sweep``. ``run`` chooses the cases; it receives the sweep with absolute
    paths, so that a folder can be resumed from anywhere. ``max_batch_limit`` is recorded for
    the search that resumes this one.
    """
    environment.check_system()
    folder = RunFolder(out_dir)
    if resume:
        folder.check_is_run()
    options = options or RunOptions.recorded(folder.settings() if resume else {})
    progress = progress or make_progress()
    facts = preflight.check(sweep)
    for notice in preflight.notices(sweep):
        progress.notice(notice)
    sweep = sweep.absolute()
    folder.prepare(sweep, resume=resume)
    with RecordsFile(folder.path) as records:
        settings = {**dataclasses.asdict(options), "max_batch_limit": max_batch_limit}
        revisions = {name: model.revision for name, model in facts.items() if model.revision is not None}
        files = dict.fromkeys(case.data_file for case in sweep.cases if case.data_file is not None)
        data_files = {file: content_hash(file) for file in files}
        earlier = folder.environments()
        environment.check_data_files(data_files, earlier)
        present = environment.describe(argv=sys.argv, settings=settings, revisions=revisions, data_files=data_files)
        changed = environment.changes(present, earlier)
        if changed is not None:
            progress.notice(changed)
        segment = folder.write_environment(present)
        interrupted = False
        try:
            with closing(make_server(facts.values())) as server:
                how: dict[str, Any] = {"segment": segment, "retry": retry, "title": Titles(sweep.cases)}
                run(Runner(folder, options, records, server, progress, **how), sweep)
        except KeyboardInterrupt:
            interrupted = True
        except OSError as error:  # such as a folder that was removed in mid-run
            raise RunFolderError(f"out '{folder.path}' cannot be used any more: {error.strerror or error}.") from error
        finally:
            progress.end()
        return RunResult(run_dir=folder.path, records=records.records, interrupted=interrupted)


def make_server(models: Iterable[ModelFacts]) -> ForkServer:
    """The fork server of a run, not started.

    It imports the module of each architecture too, which saves half a second a case.
    """
    types = dict.fromkeys(model.model_type for model in models if model.model_type)
    return ForkServer(optional=[f"transformers.models.{name}.modeling_{name}" for name in types])


class _Sampler(Protocol):
    def peak_bytes(self, pid: int) -> int | None: ...


class Runner:
    """Runs cases one after the other through a fork server and records each.

    Args:
        folder: receives logs, traces and timelines.
        options: how the cases are run.
        records: receive a record per case.
        server: forks the cases. It is started with the first case; the caller closes it.
        progress: receives what happens.
        segment: of the run, which records name.
        retry: outcomes of recorded cases that are run again, once.
        extra_settings: further fields of ``MeasurementOptions`` for every case.

    Attributes:
        memory_limit_bytes: bytes that a case may allocate; at first those of ``options``.
    """

    def __init__(
        self,
        folder: RunFolder,
        options: RunOptions,
        records: RecordsFile,
        server: ForkServer,
        progress: Progress,
        *,
        segment: Segment | None = None,
        retry: Collection[str] = (),
        extra_settings: Mapping[str, Any] | None = None,
        title: Titles | None = None,
    ) -> None:
        self._segment = segment
        self._extra_settings = dict(extra_settings or {})
        self._retried = {record["case"]["id"] for record in records.records if record["outcome"] in retry}
        self._folder, self._options, self._records = folder, options, records
        self._server, self._progress, self._title = server, progress, title or Titles()
        self.memory_limit_bytes = options.memory_limit_bytes
        self._nvml_is_missing = False

    def run_missing(self, cases: Iterable[Case]) -> None:
        """Runs and records those of ``cases`` that have no record yet, then times their later blocks."""
        cases = list(cases)
        recorded = {record["case"]["id"] for record in self._recorded()}
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
        while True:
            missing = [r for r in self._recorded() if r["case"]["id"] in ids and self._lacks_blocks(r)]
            if not missing:
                return
            number = min(_num_blocks(record) for record in missing)
            behind = [record for record in missing if _num_blocks(record) == number]
            random.Random(f"{self._segment.run_id if self._segment else ''} {number}").shuffle(behind)
            self._server.start()
            self._progress.begin_blocks(number, max(r["latency"]["num_blocks"] for r in missing), len(behind))
            for record in behind:
                self.add_block(ids[record["case"]["id"]], record)

    def _lacks_blocks(self, record: Record) -> bool:
        """True if blocks of ``record`` are to be timed. Blocks of different machines are never mixed."""
        here = self._segment is None or (record["run"] or {}).get("host") == self._segment.host
        return here and record["outcome"] == "ok" and 0 < _num_blocks(record) < (record["latency"]["num_blocks"] or 0)

    def add_block(self, case: Case, record: Record, settings: Mapping[str, Any] | None = None) -> None:
        """Times and records one more block of ``case``. A block that fails is recorded with its error.

        Args:
            case: The case.
            record: Of its earlier blocks.
            settings: Fields of ``MeasurementOptions`` that differ for this block.
        """
        number = _num_blocks(record)
        self._progress.start_block(case)
        result = self._run_process(case, number, record["latency"]["num_blocks"], settings)[0]
        block = result.get("block") or {"error": {"outcome": result["outcome"], **(result["error"] or {})}}
        self._records.append_block(record, block)
        self._progress.finish_block(case, block)

    def run(self, cases: Iterable[Case]) -> None:
        """Runs and records ``cases``; skips one that is no smaller than a case that was out of memory."""
        self._server.start()  # its imports are no part of the first case's time
        failed = [Case.from_dict(r["case"]) for r in self._recorded() if r["outcome"] == "oom"]
        for case in cases:
            self._progress.start_case(case)
            smaller = next((other for other in failed if dominates(case, other)), None)
            record = self._append(case, smaller)
            if record["outcome"] == "oom":
                failed.append(case)
            self._progress.finish_case(case, record)

    def try_case(self, case: Case) -> Record:
        """Runs and records ``case``, or returns its record from earlier."""
        record = next((r for r in self._recorded() if r["case"]["id"] == case.id), None)
        if record is None:
            self._server.start()
            self._progress.start_case(case)
            record = self._append(case, num_blocks=1)  # a try asks whether it fits: it gets no interval
            self._progress.notice(f"{self._title(case)} {record['outcome']} {record['wall_s']:.1f} s")
        return record

    def _recorded(self) -> list[Record]:
        """The records that stand: those of cases to be run again are left out."""
        return [record for record in self._records.records if record["case"]["id"] not in self._retried]

    def _append(self, case: Case, smaller: Case | None = None, *, num_blocks: int | None = None) -> Record:
        """Records ``case``: runs it, or skips it because ``smaller`` was out of memory."""
        plan = self.plan_case(case) if self._options.with_plan else None
        record = self.run_case(case, num_blocks) if smaller is None else _skipped(case, smaller)
        record["plan"] = plan
        if self._segment is not None:
            record["run"] = self._segment.to_dict()
        self._records.append(record)
        self._retried.discard(case.id)
        return record

    def run_case(self, case: Case, num_blocks: int | None = None) -> Record:
        """Runs one case and returns its record, which is not appended yet."""
        started_at, start_s = environment.now(), time.monotonic()
        result, end, driver_peak_bytes = self._run_process(case, 0, num_blocks or self._options.blocks)
        if result.get("timeline"):
            write_timeline(self._folder.timelines_dir, case.id, result["timeline"])
        record = make_record(
            case,
            outcome=result["outcome"],
            error=result["error"],
            measured=result,
            started_at=started_at,
            wall_s=time.monotonic() - start_s,
        )
        views = record["memory"]["views"]
        views["driver_peak_bytes"] = driver_peak_bytes
        if views["host_peak_bytes"] is None:
            views["host_peak_bytes"] = end.max_rss_bytes
        return record

    def _run_process(
        self, case: Case, block: int, num_blocks: int | None, settings: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], Exit, int | None]:
        """Runs one block of ``case``; returns its result, the end of its process, and the driver's view of its peak."""
        watch = _Watch(self._progress)
        log_path = self._folder.log_path(case.id if block == 0 else f"{case.id}-block{block}")
        kills = num_oom_kills()
        with self._sampler(case) as sampler:
            end = self._server.run(
                self._request(case, block, num_blocks, settings or {}),
                log_path=log_path,
                timeout_s=self._options.case_timeout_s,
                on_message=watch,
            )
            driver_peak_bytes = sampler.peak_bytes(end.pid) if sampler is not None and end.pid is not None else None
        return self._result(end, watch, log_path, oom_killed=num_oom_kills() > kills), end, driver_peak_bytes

    def plan_case(self, case: Case) -> dict[str, Any]:
        """Predicts the memory of ``case`` and returns the ``plan`` of its record, which may be an error."""
        watch = _Watch(self._progress)
        log_path = self._folder.log_path(f"{case.id}-plan")
        request = {"case": case.to_dict(), "plan": True}
        kills = num_oom_kills()
        end = self._server.run(request, log_path=log_path, timeout_s=self._options.case_timeout_s, on_message=watch)
        result = self._result(end, watch, log_path, oom_killed=num_oom_kills() > kills)
        return make_plan(result.get("memory"), result["error"])

    def _result(self, end: Exit, watch: _Watch, log_path: Path, *, oom_killed: bool) -> dict[str, Any]:
        """The result that the process sent, or one made from its exit status; deletes an empty log."""
        result = watch.result
        if result is None or end.timed_out:
            log = log_path.read_text(errors="replace")
            result = self._death(end, watch.stage, oom_killed=oom_killed, log=log)
        if not log_path.stat().st_size:
            log_path.unlink()
        return result

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
                **self._extra_settings,
                **settings,
            },
        }

    def _death(self, end: Exit, stage: str | None, *, oom_killed: bool, log: str) -> dict[str, Any]:
        """The outcome of a case that died without sending one."""
        outcome = "crashed"
        if end.timed_out:
            limit = f"{self._options.case_timeout_s:g} s"
            outcome, kind, message = "timeout", "Timeout", f"it was killed after {limit}."
        elif end.code is None:
            kind, message = "ServerDied", "the fork server died."
        elif end.code < 0:
            kind = signal.Signals(-end.code).name
            message = f"it was killed by {kind}."
            if kind == "SIGKILL" and oom_killed:
                outcome, message = "oom", "the kernel killed it: the machine was out of memory."
        else:
            kind, message = "Exit", f"it exited with status {end.code} and left no result."
        said = last_line(log)
        if outcome == "crashed" and said:
            message += f" Last line of its log: {said}"
        return {"outcome": outcome, "error": {"kind": kind, "message": message, "phase": stage}}

    def _sampler(self, case: Case) -> AbstractContextManager[_Sampler | None]:
        """A sampler of the driver's view of ``case``; ``None`` on a CPU or without NVML."""
        kind, _, index = case.device.partition(":")
        if kind != "cuda" or self._nvml_is_missing:
            return nullcontext()
        from rlhfbench.measure.nvml import NvmlSampler

        sampler = NvmlSampler(int(index or 0))
        if not sampler.available:
            self._nvml_is_missing = True
            self._progress.notice("NVML is not available on this machine: driver_peak_bytes stays empty.")
        return sampler


class _Watch:
    """Receives the messages of a case: passes them to the progress, and keeps the last stage and the result."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.stage: str | None = None
        self.result: dict[str, Any] | None = None

    def __call__(self, message: dict[str, Any]) -> None:
        if "notify" in message:
            self.stage = message["notify"].removeprefix(PHASE_PREFIX)
            self._progress.doing(message["notify"].removeprefix(PHASE_PREFIX))
        if "result" in message:
            self.result = message["result"]


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


def _num_blocks(record: Record) -> int:
    return len(record["latency"]["blocks"] or ())


def _skipped(case: Case, smaller: Case) -> Record:
    message = (
        f"case {smaller.id} ({smaller.prompt_len} + {smaller.completion_len} tokens, "
        f"batch {smaller.batch_size}, rank {smaller.options.lora.r}) is no larger, and was out of memory."
    )
    error = {"kind": "Dominates", "message": message, "phase": None}
    return make_record(case, outcome="skipped", error=error, measured={}, started_at=environment.now(), wall_s=0.0)
