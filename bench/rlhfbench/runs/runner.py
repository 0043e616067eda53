"""The run: every case of a sweep through the fork server, and what became of each into the records."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from rlhfbench.cases import preflight
from rlhfbench.cases.preflight import ModelFacts
from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import SweepError
from rlhfbench.records.file import Record, RecordsFile, make_plan, make_record
from rlhfbench.records.timelines import write_timeline
from rlhfbench.runs import environment
from rlhfbench.runs.folder import RunFolder
from rlhfbench.runs.forkserver import PRELOAD, WORKER, Exit, ForkServer, last_line
from rlhfbench.runs.progress import Progress, make_progress, title
from rlhfbench.runs.worker import PHASE_PREFIX
from rlhfkernels.config.case import Case

_AXES = ("prompt_len", "completion_len", "batch_size")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """How a sweep is run. None of it defines a case.

    Attributes:
        time_budget_s: seconds that the timing pass of a case may take.
        precision: relative error of the median at which it stops earlier.
        num_threads: threads of each case; ``None`` leaves it to torch.
        profile: whether each case's phases are traced too, into ``traces/``.
        with_plan: whether each case's memory is predicted too, in a process of its own before the case's.
        case_timeout_s: when a case is killed, whatever it does.
        memory_limit_bytes: what a case may allocate before it counts as out of memory; ``None``: what there is.

    Raises:
        SweepError: some field breaks its rule; every problem is named.
    """

    time_budget_s: float = 2.0
    precision: float = 0.02
    num_threads: int | None = None
    profile: bool = False
    with_plan: bool = False
    case_timeout_s: float = 600.0
    memory_limit_bytes: int | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}: it must be above 0."
            for name in ("time_budget_s", "precision", "num_threads", "case_timeout_s", "memory_limit_bytes")
            if getattr(self, name) is not None and not getattr(self, name) > 0
        ]
        if problems:
            raise SweepError(problems)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What a run left.

    Attributes:
        run_dir: its folder.
        records: one a case that was reached, in the order in which they were made.
        interrupted: Ctrl-C ended it before its last case.
    """

    run_dir: Path
    records: list[Record]
    interrupted: bool

    @property
    def num_ok(self) -> int:
        """How many cases were measured."""
        return sum(record["outcome"] == "ok" for record in self.records)


def run_sweep(
    sweep: Sweep,
    out_dir: str | Path,
    settings: RunSettings | None = None,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    target: str = WORKER,
    preload: tuple[str, ...] = PRELOAD,
    drive: Callable[[Runner], None] | None = None,
) -> RunResult:
    """Runs every case of ``sweep`` that is not recorded yet.

    Args:
        sweep: the cases, in their order.
        out_dir: the run's folder: a new or an empty one, or with ``resume`` one with a run of the same sweep.
        settings: how it is run.
        resume: go on with the run in ``out_dir``.
        progress: is told how it goes; by default it writes to standard error.
        target: ``module:function`` that runs one case in the forked process.
        preload: modules that the fork server imports first.
        drive: chooses what to run, case by case, in place of the sweep's cases in their order.

    Raises:
        SweepError: what is asked for cannot be run on this machine.
        RunFolderError: the folder cannot be used.
        RecordsError: the records cannot be read, or not be written any more (a full disk).
        ForkServerError: the process that cases are forked from does not start.
    """
    settings = settings or RunSettings()
    progress = progress or make_progress()
    facts = preflight.check(sweep)
    for notice in preflight.notices(sweep):
        progress.notice(notice)
    folder = RunFolder(out_dir)
    folder.prepare(sweep, resume=resume)
    with RecordsFile(folder.path) as records:
        folder.write_environment(environment.describe(argv=sys.argv, settings=dataclasses.asdict(settings)))
        recorded = {record["case"]["id"] for record in records.records}
        cases = [case for case in sweep.cases if case.id not in recorded]
        interrupted = False
        if cases or drive is not None:
            # A model's own module builds on what is preloaded, and is worth half a second a case.
            optional = _model_modules(facts.values()) if preload else []
            server = ForkServer(target=target, preload=preload, optional=optional)
            try:
                if drive is None:
                    progress.begin(cases, len(recorded))
                with server:
                    cases_runner = Runner(folder, settings, records, server, progress)
                    cases_runner.run(cases) if drive is None else drive(cases_runner)
            except KeyboardInterrupt:
                interrupted = True
            finally:
                progress.end()
        return RunResult(run_dir=folder.path, records=records.records, interrupted=interrupted)


def _model_modules(facts: Iterable[ModelFacts]) -> list[str]:
    """The modules of ``transformers`` that hold the architectures in ``facts``."""
    types = dict.fromkeys(fact.model_type for fact in facts if fact.model_type)
    return [f"transformers.models.{name}.modeling_{name}" for name in types]


class _Sampler(Protocol):
    def peak_bytes(self, pid: int) -> int | None: ...


class Runner:
    """Runs cases one after the other through a fork server and records each.

    Args:
        folder: where logs and traces go.
        settings: how cases are run.
        records: what every case's record is appended to by ``run``.
        server: started, and ended by whoever made it.
        progress: is told how it goes.
    """

    def __init__(
        self,
        folder: RunFolder,
        settings: RunSettings,
        records: RecordsFile,
        server: ForkServer,
        progress: Progress,
    ) -> None:
        self._folder, self._settings, self._records = folder, settings, records
        self._server, self._progress = server, progress
        self._nvml_is_missing = False
        self._ceilings: dict[tuple[str, str], dict[str, float]] = {}

    def run(self, cases: Iterable[Case]) -> None:
        """Runs and records ``cases``; one that dominates a case that was out of memory is skipped."""
        failed = [Case.from_dict(r["case"]) for r in self._records.records if r["outcome"] == "oom"]
        for case in cases:
            self._progress.start_case(case)
            smaller = next((other for other in failed if dominates(case, other)), None)
            record = self._append(case, smaller)
            if record["outcome"] == "oom":
                failed.append(case)
            self._progress.finish_case(case, record)

    def try_case(self, case: Case) -> Record:
        """Runs and records ``case``, or gives the record that there is of it."""
        record = next((r for r in self._records.records if r["case"]["id"] == case.id), None)
        if record is None:
            self._progress.start_case(case)
            record = self._append(case)
            self._progress.notice(f"{title(case)} {record['outcome']} {record['wall_s']:.1f} s")
        return record

    def _append(self, case: Case, smaller: Case | None = None) -> Record:
        """Runs and records ``case``, or records that it was skipped for a ``smaller`` one that was out of memory."""
        plan = self.plan_case(case) if self._settings.with_plan else None
        record = self.run_case(case) if smaller is None else _skipped(case, smaller)
        record["plan"] = plan
        self._records.append(record)
        return record

    def run_case(self, case: Case) -> Record:
        """Runs one case and says what became of it; it is not appended."""
        watch = _Watch(self._progress)
        log_path = self._folder.log_path(case.id)
        started_at, start_s, kills = environment.now(), time.monotonic(), num_oom_kills()
        with self._sampler(case) as sampler:
            end = self._server.run(
                self._request(case),
                log_path=log_path,
                timeout_s=self._settings.case_timeout_s,
                on_message=watch,
            )
            driver_peak_bytes = sampler.peak_bytes(end.pid) if sampler is not None and end.pid is not None else None
        result = self._result(end, watch, log_path, oom_killed=num_oom_kills() > kills)
        if result.get("timeline"):
            write_timeline(self._folder.timelines_dir, case.id, result["timeline"])
        if result.get("ceilings"):  # the device's, found by the first case that was measured on it
            self._ceilings[case.device, case.dtype] = result["ceilings"]
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

    def plan_case(self, case: Case) -> dict[str, Any]:
        """Predicts the memory of ``case`` and returns the record's ``plan``; one that fails costs nothing else."""
        watch = _Watch(self._progress)
        log_path = self._folder.log_path(f"{case.id}-plan")
        request = {"case": case.to_dict(), "plan": True}
        kills = num_oom_kills()
        end = self._server.run(request, log_path=log_path, timeout_s=self._settings.case_timeout_s, on_message=watch)
        result = self._result(end, watch, log_path, oom_killed=num_oom_kills() > kills)
        return make_plan(result.get("memory"), result["error"])

    def _result(self, end: Exit, watch: _Watch, log_path: Path, *, oom_killed: bool) -> dict[str, Any]:
        """What the process said became of it, or what its end says; a log that says nothing is not kept."""
        result = watch.result
        if result is None or end.timed_out:
            log = log_path.read_text(errors="replace")
            result = self._death(end, watch.stage, oom_killed=oom_killed, log=log)
        if not log_path.stat().st_size:
            log_path.unlink()
        return result

    def _request(self, case: Case) -> dict[str, Any]:
        settings = self._settings
        trace_dir = str((self._folder.traces_dir / case.id).absolute()) if settings.profile else None
        return {
            "case": case.to_dict(),
            "memory_limit_bytes": settings.memory_limit_bytes,
            "settings": {
                "time_budget_s": settings.time_budget_s,
                "precision": settings.precision,
                "num_threads": settings.num_threads,
                "profile_dir": trace_dir,
                "timeline": True,
                "ceilings": self._ceilings.get((case.device, case.dtype)),
            },
        }

    def _death(self, end: Exit, stage: str | None, *, oom_killed: bool, log: str) -> dict[str, Any]:
        """The outcome of a case that did not tell its own."""
        outcome = "crashed"
        if end.timed_out:
            limit = f"{self._settings.case_timeout_s:g} s"
            outcome, kind, message = "timeout", "Timeout", f"it was not done after {limit} and was ended."
        elif end.code is None:
            kind, message = "ServerDied", "the process that it was forked from died."
        elif end.code < 0:
            kind = signal.Signals(-end.code).name
            message = f"it was killed by {kind}."
            if kind == "SIGKILL" and oom_killed:
                outcome, message = "oom", "the kernel killed it because the machine's memory was out."
        else:
            kind, message = "Exit", f"it exited with status {end.code} and left no result."
        said = last_line(log)
        if outcome == "crashed" and said:
            message += f" Its last words: {said}"
        return {"outcome": outcome, "error": {"kind": kind, "message": message, "phase": stage}}

    def _sampler(self, case: Case) -> AbstractContextManager[_Sampler | None]:
        """Samples the driver from here while ``case`` runs, where there is a driver to ask."""
        kind, _, index = case.device.partition(":")
        if kind != "cuda" or self._nvml_is_missing:
            return nullcontext()
        from rlhfbench.measure.nvml import NvmlSampler

        sampler = NvmlSampler(int(index or 0))
        if not sampler.available:
            self._nvml_is_missing = True
            self._progress.notice("NVML cannot be asked on this machine: driver_peak_bytes stays empty.")
        return sampler


class _Watch:
    """Takes a case's messages: tells the progress, and keeps the stage and the result."""

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
    """Whether ``case`` is the same as ``other`` in all but its axes and its seed, and no axis is smaller."""
    options = case.options.replace({"lora.r": other.options.lora.r})
    axes = {axis: getattr(other, axis) for axis in _AXES}
    same = dataclasses.replace(case, seed=other.seed, options=options, **axes)
    larger = all(getattr(case, axis) >= getattr(other, axis) for axis in _AXES)
    return same == other and larger and case.options.lora.r >= other.options.lora.r


def _skipped(case: Case, smaller: Case) -> Record:
    message = (
        f"case {smaller.id} ({smaller.prompt_len} + {smaller.completion_len} tokens, "
        f"batch {smaller.batch_size}, rank {smaller.options.lora.r}) is no larger and was out of memory."
    )
    error = {"kind": "Dominates", "message": message, "phase": None}
    return make_record(case, outcome="skipped", error=error, measured={}, started_at=environment.now(), wall_s=0.0)


def num_oom_kills() -> int:
    """How often the kernel has killed for memory since the machine started; 0 where it does not tell."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
