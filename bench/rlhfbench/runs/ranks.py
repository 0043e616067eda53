"""Starts the ranks of a case on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from rlhfbench.processes import num_oom_kills
from rlhfbench.runs.faults import Rank, Usage
from rlhfbench.runs.forkserver_process import Message
from rlhfbench.runs.hangs import CpuMeter
from rlhfbench.runs.job import Exit, Job
from rlhfbench.runs.supervise import conclude, detector_for, supervise
from rlhfbench.runs.worker import PHASE_PREFIX

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

    def scratch(self) -> AbstractContextManager[Path]:
        """Makes a folder for the block."""

    def job(
        self, requests: Sequence[Message], log_paths: Sequence[Path], on_message: Callable[[int, Message], None]
    ) -> AbstractContextManager[Job]:
        """Forks one process for each request."""


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
            return
        if "notify" in message:
            rank.phase = message["notify"].removeprefix(PHASE_PREFIX)
        if number == 0:
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
                num_phases, is_stepping, phase = place
                rank.phase = phase or rank.phase
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
    with server.scratch() as folder:
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
