"""Runs a case of several ranks: starts them, watches them, and ends all of them when one fails or hangs."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from rlhfbench.processes import num_oom_kills
from rlhfbench.runs.faults import Rank, Usage, Verdict, judge
from rlhfbench.runs.forkserver_process import Message
from rlhfbench.runs.hangs import TICK_S, CpuMeter, HangDetector
from rlhfbench.runs.job import Exit, Job

GRACE_S = 4.0  # seconds that ranks have to notice the end of another
_DUMP_S = 1.5

# Modules that the fork server imports for the ranks of a case, by strategy; a second or more of the compiler's.
_PRELOAD = {
    "ddp": ("torch.nn.parallel.distributed",),
    "fsdp": ("torch.distributed.fsdp", "torch.distributed.device_mesh"),
    "deepspeed": ("torch.distributed.device_mesh",),
}


def world_of(request: Mapping[str, Any]) -> int | None:
    """The number of ranks of a request for the worker; ``None`` if its case runs in one process without a world.

    A plan of such a case runs in one process too.
    """
    parallel: Message = ((request.get("case") or {}).get("options") or {}).get("parallel") or {}
    if request.get("plan") or parallel.get("strategy") is None:
        return None
    return int(parallel.get("world_size", 1))


class Server(Protocol):
    """The fork server, as far as ranks need it."""

    def job(
        self, requests: Sequence[Message], log_paths: Sequence[Path], on_message: Callable[[int, Message], None]
    ) -> AbstractContextManager[Job]:
        """Forks one process for each request."""


class RankProcesses(Protocol):
    """The processes of all ranks, wherever they run."""

    ranks: list[Rank]

    def wait(self, timeout_s: float) -> None:
        """Waits for a message or an exit of some rank, and takes it."""

    def look(self) -> None:
        """Takes the usage of every rank that runs."""

    def dump(self) -> None:
        """Has every rank that runs write its stack."""

    def take_stacks(self) -> None:
        """Reads the stacks that were written after ``dump``."""

    def kill(self) -> None:
        """Kills every rank that runs."""

    def abandon(self) -> None:
        """Notes that ranks cannot be killed, since who starts them is gone."""


class LocalRanks:
    """Ranks that one fork server forked on this machine.

    Args:
        size: Number of ranks.
        log_paths: Of their logs.
        on_message: Called with the messages of rank 0, results left out.
    """

    def __init__(self, log_paths: Sequence[Path], on_message: Callable[[Message], None]) -> None:
        self.ranks = [Rank(number) for number in range(len(log_paths))]
        self.job: Job | None = None
        self._logs, self._on_message = list(log_paths), on_message
        self._dumped_from = [0] * len(log_paths)
        self._meters = [CpuMeter() for _ in log_paths]

    def take(self, number: int, message: Message) -> None:
        """Takes a message of a rank."""
        rank = self.ranks[number]
        if "result" in message:
            rank.result = message["result"]
        elif number == 0:
            self._on_message(message)

    def wait(self, timeout_s: float) -> None:
        """Waits for a message or an exit of some rank, and takes it."""
        assert self.job is not None
        self.job.wait(timeout_s)
        for rank, found in zip(self.ranks, self.job.exits, strict=True):
            rank.exit = found

    def look(self) -> None:
        """Takes the usage of every rank that runs; its phases as they were when this was called last."""
        assert self.job is not None
        for rank, pid, place, meter in zip(self.ranks, self.job.pids, self.job.places, self._meters, strict=True):
            if rank.exit is None:
                seconds = None if pid is None else meter.cpu_s(pid)
                num_phases, is_stepping = place
                rank.usage = None if seconds is None else Usage(seconds, num_phases, is_stepping)
        self.job.ask_where()

    def dump(self) -> None:
        """Has every rank that runs write its stack."""
        assert self.job is not None
        self._dumped_from = [path.stat().st_size for path in self._logs]
        self.job.dump()

    def take_stacks(self) -> None:
        """Reads the stacks that were written after ``dump``."""
        for rank, path, start in zip(self.ranks, self._logs, self._dumped_from, strict=True):
            if rank.exit is None:
                rank.stack = path.read_bytes()[start:].decode(errors="replace")

    def kill(self) -> None:
        """Kills every rank that runs."""
        assert self.job is not None
        self.job.kill()

    def abandon(self) -> None:
        """Notes that the fork server does not answer."""
        assert self.job is not None
        self.job.abandon()
        for rank, found in zip(self.ranks, self.job.exits, strict=True):
            rank.exit = found


def run_ranks(
    server: Server,
    request: Message,
    size: int,
    *,
    log_path: Path,
    timeout_s: float | None,
    on_message: Callable[[Message], None],
) -> Exit:
    """Runs one case on this machine, in ``size`` processes, until all have ended.

    Arguments are those of ``ForkServer.run``. A fault is told as a result: the rank, its phase, and the collective in
    which the others waited.

    Returns:
        The exit of rank 0, with the largest resident set of any rank.
    """
    logs = [
        log_path if n == 0 else log_path.with_name(f"{log_path.stem}-rank{n}{log_path.suffix}") for n in range(size)
    ]
    with tempfile.TemporaryDirectory(prefix="rlhfbench-ranks-") as folder:
        address = f"file://{folder}/store"
        ranks = LocalRanks(logs, on_message)
        requests = [rank_request(request, n, size, n, size, address, timeout_s) for n in range(size)]
        with server.job(requests, logs, ranks.take) as ranks.job:
            kills = num_oom_kills()
            verdict = supervise(ranks, timeout_s, detector_for(request))
        return conclude(ranks.ranks, verdict, logs, on_message, oom_killed=num_oom_kills() > kills)


def rank_request(
    request: Message, rank: int, size: int, local_rank: int, local_size: int, address: str, timeout_s: float | None
) -> Message:
    """The request of one rank.

    Args:
        request: Of the case.
        rank: Among all.
        size: Of the world.
        local_rank: Among the ranks of its machine.
        local_size: Ranks of its machine, which share its cores.
        address: Where the ranks find each other.
        timeout_s: Of the case: no collective waits longer.
    """
    place = {"rank": rank, "size": size, "local_rank": local_rank, "local_size": local_size, "address": address}
    preload = _PRELOAD[request["case"]["options"]["parallel"]["strategy"]]
    return {**request, "rank": {**place, "timeout_s": timeout_s}, "preload": preload}


def detector_for(request: Message) -> HangDetector | None:
    """The detector of ranks that hang; ``None`` where two cases step in turns, and all ranks of one may just wait."""
    if request["settings"].get("turns"):
        return None
    rollout: Message = request["case"]["options"].get("rollout") or {}
    # Where completions may end early, one rank may rightly generate for much longer than the others.
    return HangDetector(finds_loops=rollout.get("stop_token_id") is None)


def supervise(ranks: RankProcesses, timeout_s: float | None, detector: HangDetector | None) -> Verdict:
    """Waits until all ranks have ended; ends them when one fails, all sleep, or ``timeout_s`` is over.

    Args:
        ranks: The processes.
        timeout_s: Seconds from now.
        detector: Looks for ranks that hang.

    Returns:
        Why the ranks were ended; ``Verdict.ENDED`` where they ended by themselves.
    """
    deadline_s = float("inf") if timeout_s is None else time.monotonic() + timeout_s
    looked_s, failed_s = 0.0, float("inf")
    while any(rank.exit is None for rank in ranks.ranks):
        now_s = time.monotonic()
        if now_s >= min(deadline_s, failed_s + GRACE_S):
            verdict = Verdict.TIMEOUT if now_s >= deadline_s else Verdict.ENDED
            _end(ranks)
            return verdict
        ranks.wait(max(0.0, min(TICK_S, deadline_s - now_s)))
        if any(rank.has_failed for rank in ranks.ranks):
            failed_s = min(failed_s, time.monotonic())
        elif detector is not None and time.monotonic() >= looked_s + TICK_S:
            looked_s = time.monotonic()
            ranks.look()
            found = detector.verdict(ranks.ranks, looked_s)
            if found is not None and _hang(ranks, found, detector):
                return found
    return Verdict.ENDED


def _hang(ranks: RankProcesses, found: Verdict, detector: HangDetector) -> bool:
    """Ends ranks that hang. Not those of which some sleep in no collective: they wait for something else."""
    if found is Verdict.STALL:
        _end(ranks)
        return True
    _read_stacks(ranks)
    running = [rank for rank in ranks.ranks if rank.exit is None]
    if any(rank.has_failed for rank in ranks.ranks) or any(
        rank.collective is None and not rank.is_late for rank in running
    ):
        for rank in running:
            rank.stack = ""
        detector.allow(ranks.ranks, time.monotonic())
        return False
    _kill(ranks)
    return True


def _end(ranks: RankProcesses) -> None:
    """Reads the stacks of the ranks that run, then kills them and waits for their end."""
    _read_stacks(ranks)
    _kill(ranks)


def _read_stacks(ranks: RankProcesses) -> None:
    ranks.dump()
    wait_for_end(ranks, _DUMP_S)
    ranks.take_stacks()


def _kill(ranks: RankProcesses) -> None:
    ranks.kill()
    wait_for_end(ranks, 2 * GRACE_S)
    ranks.abandon()


def wait_for_end(ranks: RankProcesses, for_s: float) -> None:
    """Waits for the end of all ranks, at most ``for_s``."""
    until_s = time.monotonic() + for_s
    while any(rank.exit is None for rank in ranks.ranks) and (left_s := until_s - time.monotonic()) > 0:
        ranks.wait(left_s)


def conclude(
    ranks: Sequence[Rank],
    verdict: Verdict,
    logs: Sequence[Path],
    on_message: Callable[[Message], None],
    *,
    oom_killed: bool,
) -> Exit:
    """Sends the result of a case whose ranks have ended, and returns the exit of rank 0.

    Args:
        ranks: All of them.
        verdict: Why they ended.
        logs: Of the ranks of this machine, rank 0 first. Empty ones of later ranks are deleted.
        on_message: Receives the result: that of rank 0, or the fault.
        oom_killed: Whether Linux killed a process for memory meanwhile.
    """
    for rank, path in zip(ranks, logs, strict=False):
        rank.log = path.read_text(errors="replace")
        if rank.number and not path.stat().st_size:
            path.unlink()
    ends = [rank.exit for rank in ranks if rank.exit is not None]
    if any(end.code is None for end in ends):
        return next(end for end in ends if end.code is None)
    fault = judge(ranks, verdict, oom_killed=oom_killed)
    result = fault or ranks[0].result
    on_message({"result": result})
    peaks = [end.max_rss_bytes for end in ends if end.max_rss_bytes is not None]
    return dataclasses.replace(ends[0], max_rss_bytes=max(peaks, default=None), timed_out=False)
