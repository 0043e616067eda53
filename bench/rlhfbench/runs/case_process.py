"""Runs one block of one case in a fresh process on this machine, and concludes what became of it."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from rlhfbench.launch import find_launch
from rlhfbench.measure.options import BUILD
from rlhfbench.processes import num_oom_kills
from rlhfbench.records.file import make_plan
from rlhfbench.runs import environment, versions
from rlhfbench.runs.execution import Ended, Start, Task
from rlhfbench.runs.faults import last_line, signal_name
from rlhfbench.runs.forkserver import ForkServer
from rlhfbench.runs.job import Exit
from rlhfbench.runs.progress import Progress, Silent
from rlhfbench.runs.ranks import run_ranks, world_of
from rlhfbench.runs.worker import PHASE_PREFIX, threads_of_a_rank
from rlhfkernels.config.case import Case


def _code() -> tuple[Any, ...] | None:
    """The code that a new server would import; ``None`` where a source file vanishes while it is read."""
    try:
        return versions.installed(), environment.package_versions()
    except OSError:
        return None


class _Sampler(Protocol):
    def peak_bytes(self, pid: int) -> int | None: ...

    def restart(self) -> None: ...


class ThisMachine:
    """The executor of this machine: one case after the other, each forked by a fork server.

    Args:
        server: forks the cases. It is started with the first case.
        progress: receives the stages of cases, and notices.
        runs_ranks: runs a case of several ranks: all of them here, or one in each process of a launcher.
    """

    def __init__(
        self, server: ForkServer, progress: Progress | None = None, *, runs_ranks: Callable[..., Exit] = run_ranks
    ) -> None:
        self._server, self._progress, self._runs_ranks = server, progress or Silent(), runs_ranks
        self._nvml_is_missing = False
        self._code = _code()

    def start(self, *, round_s: float = 0.0) -> None:
        """Starts the fork server: its imports are no part of the first case's time.

        Forks share the layout of their server's memory, which makes some phases up to 4 % slower. So each round of
        blocks has a server of its own, if starting it takes less time than the round. Not if a source file was edited
        or a package replaced: a new server would import it, and the blocks of a case would be of two codes.
        """
        if 0 < self._server.start_s < round_s and (code := _code()) is not None and code == self._code:
            self._server.close()
        self._server.start()

    def close(self) -> None:
        """Ends the fork server and the case that it runs."""
        self._server.close()

    def can_run_on(self, host: str | None) -> bool:
        """True if ``host`` is this machine."""
        return host == platform.node()

    def run(
        self, cases: Sequence[Case], start: Start, hosts: Mapping[str, str | None] | None = None
    ) -> Iterator[Ended]:
        """Runs the cases in their order. See ``Executor.run``."""
        for case in cases:
            task = start(case)
            if task is not None:
                yield self.run_task(task)

    def run_task(self, task: Task) -> Ended:
        """Runs a task to its end."""
        plan, plan_timeline = self._plan(task) if task.with_plan else (None, None)
        started_at, start_s = environment.now(), time.monotonic()
        if task.request is None:
            return Ended(task=task, result={}, started_at=started_at, plan=plan, plan_timeline=plan_timeline)
        with self._sampler(task.case) as sampler:
            result, end = self._run(task.request, task.log_path, task.timeout_s, sampler)
            driver_peak_bytes = sampler.peak_bytes(end.pid) if sampler is not None and end.pid is not None else None
        return Ended(
            task=task,
            result=result,
            started_at=started_at,
            wall_s=time.monotonic() - start_s,
            max_rss_bytes=end.max_rss_bytes,
            driver_peak_bytes=driver_peak_bytes,
            plan=plan,
            plan_timeline=plan_timeline,
        )

    def _plan(self, task: Task) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Predicts the memory of the case: the ``plan`` of its record, which may be an error, and its timeline."""
        request = {"case": task.case.to_dict(), "plan": True, "num_threads": _num_threads(task)}
        result, _ = self._run(request, task.plan_log_path, task.timeout_s)
        return make_plan(result.get("memory"), result["error"]), result.get("timeline")

    def _run(
        self, request: Mapping[str, Any], log_path: Path, timeout_s: float, sampler: _Sampler | None = None
    ) -> tuple[dict[str, Any], Exit]:
        """The result that the process sent, or one made from its exit status, and its end; deletes an empty log."""

        def enter(stage: str) -> None:
            if stage == BUILD and sampler is not None:
                sampler.restart()  # what the ceilings took is no memory of the case
            self._progress.doing(stage)

        watch, kills = _Watch(enter), num_oom_kills()
        size = world_of(request)
        how: dict[str, Any] = {"log_path": log_path, "timeout_s": timeout_s, "on_message": watch}
        if size is None:
            end = self._server.run(dict(request), **how)
        else:
            end = self._runs_ranks(self._server, dict(request), size, **how)
        result = watch.result
        if result is None or end.timed_out:
            log, oom_killed = log_path.read_text(errors="replace"), num_oom_kills() > kills
            result = _death(end, watch.stage, timeout_s=timeout_s, oom_killed=oom_killed, log=log)
        if not log_path.stat().st_size:
            log_path.unlink()
        return result, end

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
    """Receives the messages of a case: passes its stages on, and keeps the last stage and the result."""

    def __init__(self, on_stage: Callable[[str], None]) -> None:
        self._on_stage = on_stage
        self.stage: str | None = None
        self.result: dict[str, Any] | None = None

    def __call__(self, message: dict[str, Any]) -> None:
        if "notify" in message:
            self.stage = message["notify"].removeprefix(PHASE_PREFIX)
            self._on_stage(message["notify"].removeprefix(PHASE_PREFIX))
        if "result" in message:
            self.result = message["result"]


def _num_threads(task: Task) -> int | None:
    """Threads of the processes of a case; ``None`` for torch's default. A rank without a number has its share."""
    found: int | None = (task.request or {}).get("settings", {}).get("num_threads")
    size = world_of({"case": task.case.to_dict()})
    if found is not None or size is None:
        return found
    launch = find_launch()
    return threads_of_a_rank(size if launch is None else launch.num_local(size))


def _death(end: Exit, stage: str | None, *, timeout_s: float, oom_killed: bool, log: str) -> dict[str, Any]:
    """The outcome of a case that died without sending one."""
    outcome = "crashed"
    if end.timed_out:
        outcome, kind, message = "timeout", "Timeout", f"it was killed after {timeout_s:g} s."
    elif end.code is None:
        kind, message = "ServerDied", "the fork server died."
    elif end.code < 0:
        kind = signal_name(-end.code)
        message = f"it was killed by {kind}."
        if kind == "SIGKILL" and oom_killed:
            outcome, message = "oom", "the kernel killed it: the machine was out of memory."
    else:
        kind, message = "Exit", f"it exited with status {end.code} and left no result."
    said = last_line(log)
    if outcome == "crashed" and said:
        message += f" Last line of its log: {said}"
    return {"outcome": outcome, "error": {"kind": kind, "message": message, "phase": stage}}
