"""Cases over the processes of a launcher: the one of rank 0 runs the sweep, each other starts its own rank of a case.

Every process has a fork server, so that each case gets fresh processes here too. The processes meet at a
``torch.distributed.TCPStore``: that of torchrun, or one that rank 0 opens. Rank 0 writes numbered messages, each a case
or the end; the others write the state of their rank, once a second and when it ends.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfbench.errors import SweepError
from rlhfbench.launch import Launch, find_launch
from rlhfbench.processes import num_oom_kills
from rlhfbench.runs.faults import Rank, Usage
from rlhfbench.runs.forkserver_process import Message
from rlhfbench.runs.hangs import TICK_S
from rlhfbench.runs.job import Exit
from rlhfbench.runs.ranks import (
    LocalRanks,
    Server,
    conclude,
    detector_for,
    rank_request,
    supervise,
    wait_for_end,
)

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

MEET_S = 60.0  # seconds within which all processes must have come
_LOST_S = 10.0  # seconds without a state after which a process is gone; before its first it may still import torch
_LATE_S = 0.05  # between looks at the others' states once the own rank has ended
_MAX_LOG_CHARS = 2000


def meet(launch: Launch) -> Store:
    """The store at which the launcher's processes meet.

    Raises:
        SweepError: the port is in use, or rank 0 does not answer within a minute.
    """
    from torch._C._distributed_c10d import PrefixStore, TCPStore
    from torch.distributed import DistError

    where = f"{launch.host}:{launch.port}"
    try:
        store = TCPStore(
            launch.host,
            launch.port,
            is_master=launch.rank == 0 and not launch.has_store,
            timeout=datetime.timedelta(seconds=MEET_S),
            wait_for_workers=False,
        )
    except (DistError, OSError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise SweepError([f"MASTER_PORT is {launch.port}: it is in use on this machine."]) from error
        raise SweepError([f"the launcher's address is {where}: no process of rank 0 answers there."]) from error
    return PrefixStore("rlhfbench", store)


@functools.cache
def head() -> Head:
    """The head of the launcher's processes, in the process of rank 0 that a launcher started.

    Raises:
        SweepError: see ``meet``.
    """
    return Head(_launch())


@functools.cache
def follower() -> Follower:
    """The follower of the head, in the process of another rank that a launcher started.

    Raises:
        SweepError: see ``meet``.
    """
    return Follower(_launch())


def _launch() -> Launch:
    launch = find_launch()
    assert launch is not None, "a launcher started this process"
    return launch


class Head:
    """The process of rank 0, which has the others start their ranks.

    Args:
        launch: of this process.

    Raises:
        SweepError: see ``meet``.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch, self._store = launch, meet(launch)
        self._num_messages, self._is_ended = 0, False
        self._heard = set[int]()  # ranks that have sent a state

    def run(
        self,
        server: Server,
        request: Message,
        size: int,
        *,
        log_path: Path,
        timeout_s: float | None,
        on_message: Callable[[Message], None],
    ) -> Exit:
        """Runs one case with a rank in each process; see ``rlhfbench.runs.ranks.run_ranks``."""
        address = f"tcp://{self._launch.host}:{_free_port()}"
        number = self._send({"request": request, "size": size, "address": address, "timeout_s": timeout_s})
        ranks = LaunchedRanks(self._store, number, size, log_path, on_message, self._heard)
        own = _own_request(self._launch, request, size, address, timeout_s)
        kills = num_oom_kills()
        with server.job([own], [log_path], ranks.local.take) as ranks.local.job:
            verdict = supervise(ranks, timeout_s, detector_for(request))
        return conclude(ranks.ranks, verdict, [log_path], on_message, oom_killed=num_oom_kills() > kills)

    def end(self) -> None:
        """Ends the run of the other processes, and waits briefly for their farewell: their store may end with this one.

        A second call without a case between does nothing.
        """
        if self._is_ended:
            return
        number = self._send({"end": True})
        self._is_ended = True
        until_s = time.monotonic() + _LOST_S / 2
        farewells = [f"bye/{number}/{rank}" for rank in range(1, self._launch.size)]
        while not self._store.check(farewells) and time.monotonic() < until_s:
            time.sleep(_LATE_S)

    def _send(self, message: dict[str, Any]) -> int:
        self._num_messages += 1
        self._is_ended = False
        self._store.set(f"message/{self._num_messages}", json.dumps(message))
        return self._num_messages


class LaunchedRanks:
    """The ranks of a case, of which rank 0 runs here and each other by its own process.

    Args:
        store: where their states are.
        number: of the case's message.
        size: of the world.
        log_path: of rank 0.
        on_message: called with the messages of rank 0.
        heard: ranks whose processes have sent a state, of any case. Grows.
    """

    def __init__(
        self,
        store: Store,
        number: int,
        size: int,
        log_path: Path,
        on_message: Callable[[Message], None],
        heard: set[int],
    ) -> None:
        self._store, self._number, self._heard = store, number, heard
        self.local = LocalRanks([log_path], on_message)
        self.ranks = [*self.local.ranks, *(Rank(rank) for rank in range(1, size))]
        now_s = time.monotonic()
        self._heard_s = dict.fromkeys(range(1, size), now_s)
        self._states: dict[int, dict[str, Any]] = {}

    def wait(self, timeout_s: float) -> None:
        """Waits for a message of rank 0, or briefly for states, and takes them."""
        is_over = self.ranks[0].exit is not None
        if is_over:
            time.sleep(min(timeout_s, _LATE_S))
        else:
            self.local.wait(min(timeout_s, TICK_S))
        for rank in self.ranks[1:]:
            if rank.exit is None:
                self._read(rank)

    def _read(self, rank: Rank) -> None:
        """Takes the state of a rank; one that has had no new state for 10 s is lost, before its first for a minute."""
        key = f"state/{self._number}/{rank.number}"
        state = json.loads(self._store.get(key)) if self._store.check([key]) else {}
        if state != self._states.get(rank.number, {}):
            self._states[rank.number] = state
            self._heard_s[rank.number] = time.monotonic()
            self._heard.add(rank.number)
            rank.result, rank.stack, rank.log = state["result"], state["stack"], state["log"]
            rank.usage = None if state["usage"] is None else Usage(**state["usage"])
            rank.exit = None if state["exit"] is None else Exit(**state["exit"])
        elif time.monotonic() - self._heard_s[rank.number] > (
            limit_s := _LOST_S if rank.number in self._heard else MEET_S
        ):
            message = f"the process that the launcher started for it did not answer for {limit_s:g} s."
            error = {"kind": "LauncherDied", "message": message, "phase": None}
            rank.result = {"outcome": "crashed", "error": error}
            rank.exit = Exit(pid=None, code=1, max_rss_bytes=None)

    def look(self) -> None:
        """Takes the usage of rank 0; that of the others came with their states."""
        self.local.look()

    def dump(self) -> None:
        """Has every rank that runs write its stack."""
        self.local.dump()
        self._store.add(f"dump/{self._number}", 1)

    def take_stacks(self) -> None:
        """Reads the stack of rank 0; those of the others came with their states."""
        self.local.take_stacks()

    def kill(self) -> None:
        """Kills every rank that runs."""
        self.local.kill()
        self._store.set(f"kill/{self._number}", "")

    def abandon(self) -> None:
        """Notes that whoever has not ended will not be waited for."""
        self.local.abandon()
        for rank in self.ranks[1:]:
            rank.exit = rank.exit or Exit(pid=None, code=1, max_rss_bytes=None)


class Follower:
    """A process of another rank, which starts its rank of every case that rank 0 sends.

    Args:
        launch: of this process; not rank 0.

    Raises:
        SweepError: see ``meet``.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch, self._store = launch, meet(launch)
        self._num_messages = 0

    def follow(self, server: Server) -> None:
        """Runs this process's rank of every case of a run, until rank 0 sends the end.

        Args:
            server: forks the ranks.

        Raises:
            SweepError: rank 0 is gone.
        """
        from torch.distributed import DistError, DistStoreError

        while True:
            key = f"message/{self._num_messages + 1}"
            try:
                self._store.wait([key], datetime.timedelta(seconds=MEET_S))
                message = json.loads(self._store.get(key))
                self._num_messages += 1
                if "end" in message:
                    self._store.set(f"bye/{self._num_messages}/{self._launch.rank}", "")
                    return
                if self._launch.rank < message["size"]:
                    self._run_own(server, self._num_messages, message)
            except DistStoreError:  # no message within a minute: the present case goes on without this rank
                continue
            except DistError as error:
                raise SweepError(["the process of rank 0 is gone."]) from error

    def _run_own(self, server: Server, number: int, message: dict[str, Any]) -> None:
        """Runs this process's rank of one case, and writes its state to the store."""
        request = _own_request(
            self._launch, message["request"], message["size"], message["address"], message["timeout_s"]
        )
        with tempfile.TemporaryDirectory(prefix="rlhfbench-rank-") as folder:
            log_path = Path(folder) / "log"
            ranks = LocalRanks([log_path], lambda told: None)
            (rank,) = ranks.ranks
            beat, num_dumps = 0, 0
            with server.job([request], [log_path], ranks.take) as ranks.job:
                while rank.exit is None:
                    ranks.wait(TICK_S / 2)
                    if (asked := self._number_at(f"dump/{number}")) > num_dumps:
                        num_dumps = asked
                        ranks.dump()
                        wait_for_end(ranks, TICK_S / 4)
                        ranks.take_stacks()
                    if self._store.check([f"kill/{number}"]):
                        ranks.kill()
                    ranks.look()
                    beat += 1
                    self._store.set(f"state/{number}/{self._launch.rank}", json.dumps(_state(rank, log_path, beat)))

    def _number_at(self, key: str) -> int:
        return int(self._store.get(key)) if self._store.check([key]) else 0


def _state(rank: Rank, log_path: Path, beat: int) -> dict[str, Any]:
    """The state of a rank that rank 0 reads; ``beat`` tells one state from the next."""
    return {
        "beat": beat,
        "usage": None if rank.usage is None else dataclasses.asdict(rank.usage),
        "result": rank.result,
        "stack": rank.stack,
        "log": log_path.read_text(errors="replace")[-_MAX_LOG_CHARS:],
        "exit": None if rank.exit is None else dataclasses.asdict(rank.exit),
    }


def _own_request(launch: Launch, request: Message, size: int, address: str, timeout_s: float | None) -> Message:
    """The request of this process's rank."""
    first = launch.rank - launch.local_rank  # of this machine, whose last ranks may be beyond the world
    local_size = min(launch.local_size, size - first)
    return rank_request(request, launch.rank, size, launch.local_rank, local_size, address, timeout_s)


def _free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as found:
        found.bind(("", 0))
        port: int = found.getsockname()[1]
        return port
