"""The process of rank 0 that a launcher started: it runs the sweep, and has the others start their ranks of a case.

Every process has a fork server, so that each case gets fresh processes here too. Rank 0 writes numbered messages to the
store, each a case or the end; the others write the state of their rank, twice a second and when it ends.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhfbench.errors import SweepError
from rlhfbench.launch import Launch, find_launch
from rlhfbench.network import free_port, url_of
from rlhfbench.processes import num_oom_kills
from rlhfbench.runs.faults import Rank, Usage
from rlhfbench.runs.follower import own_request
from rlhfbench.runs.forkserver_process import Message
from rlhfbench.runs.hangs import TICK_S
from rlhfbench.runs.job import Exit
from rlhfbench.runs.ranks import LocalRanks, Server
from rlhfbench.runs.rendezvous import JOIN_S, LOST_S, SharedStore, join, machines, own_address
from rlhfbench.runs.supervise import conclude, detector_for, supervise

_STALE_S = 3.0  # an older state does not say what the rank does now: six newer ones were due
_LATE_S = 0.05  # between looks at the others' states once the own rank has ended


@functools.cache
def leader() -> Leader:
    """The leader of the launcher's processes, in the process of rank 0 that a launcher started.

    Raises:
        SweepError: see ``SharedStore`` and ``join``.
    """
    launch = find_launch()
    assert launch is not None, "a launcher started this process"
    return Leader(launch)


@dataclasses.dataclass(slots=True)
class Peer:
    """The process of another rank.

    Attributes:
        host: name of its machine.
        has_answered: it has sent a state, and its fork server lives: it has imported everything.
        is_lost: it has stopped to answer.
    """

    host: str
    has_answered: bool = False
    is_lost: bool = False


class Leader:
    """The process of rank 0, which has the others start their ranks.

    Args:
        launch: of this process.

    Raises:
        SweepError: see ``SharedStore`` and ``join``.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch, self._store = launch, SharedStore(launch)
        join(self._store, launch)
        self._num_messages, self._is_ended = 0, False
        self._peers: dict[int, Peer] = {}

    def start(self) -> None:
        """Begins a run: waits until all other processes have joined, at the first call.

        Raises:
            SweepError: one did not join within a minute, or has another version of the package.
        """
        self._is_ended = False
        if not self._peers:
            found = machines(self._store, self._launch)
            self._address = own_address(self._launch, found)
            self._peers = {rank: Peer(machine["host"]) for rank, machine in found.items()}

    @property
    def layout(self) -> str:
        """The number of ranks of each machine, in the order of ranks: ``4 here, 4 on b``. Known after ``start``."""
        here = platform.node()
        hosts = [here, *(peer.host for peer in self._peers.values())]
        counts = [(host, len(list(ranks))) for host, ranks in itertools.groupby(hosts)]
        return ", ".join(f"{count} here" if host == here else f"{count} on {host}" for host, count in counts)

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
        message = {
            "request": request,
            "size": size,
            "address": url_of(self._address, free_port()),
            "timeout_s": timeout_s,
        }
        ranks = LaunchedRanks(self._store, self._send(message), size, log_path, on_message, self._peers)
        kills = num_oom_kills()
        with server.job([own_request(self._launch, message)], [log_path], ranks.local.take) as ranks.local.job:
            verdict = supervise(ranks, timeout_s, detector_for(request))
        return conclude(ranks.ranks, verdict, [log_path], on_message, oom_killed=num_oom_kills() > kills)

    def end(self) -> None:
        """Ends the run of the other processes, and waits briefly for their farewell: their store may end with this one.

        A second call without ``start`` between does nothing.
        """
        if self._is_ended:
            return
        self._is_ended = True
        until_s = time.monotonic() + LOST_S / 2
        with suppress(SweepError):  # the store is gone, and the others with it
            number = self._send({"end": True})
            for rank in range(1, self._launch.size):
                if rank not in self._peers or not self._peers[rank].is_lost:
                    self._store.wait(f"bye/{number}/{rank}", max(until_s - time.monotonic(), _LATE_S))

    def _send(self, message: Mapping[str, Any]) -> int:
        self._num_messages += 1
        self._store.write(f"message/{self._num_messages}", message)
        return self._num_messages


class LaunchedRanks:
    """The ranks of a case, of which rank 0 runs here and each other by its own process.

    Args:
        store: where their states are.
        number: of the case's message.
        size: of the world.
        log_path: of rank 0.
        on_message: called with the messages of rank 0.
        peers: the processes of the other ranks. What becomes of them is noted.
    """

    def __init__(
        self,
        store: SharedStore,
        number: int,
        size: int,
        log_path: Path,
        on_message: Callable[[Message], None],
        peers: Mapping[int, Peer],
    ) -> None:
        self._store, self._number, self._peers = store, number, peers
        self.local = LocalRanks([log_path], on_message)
        self.ranks = [*self.local.ranks, *(Rank(rank) for rank in range(1, size))]
        self._heard_s = dict.fromkeys(range(1, size), time.monotonic())
        self._num_beats = dict.fromkeys(range(1, size), 0)
        self._num_dumps = 0

    def wait(self, timeout_s: float) -> None:
        """Waits for a message of rank 0, or briefly for states, and takes them."""
        if self.ranks[0].exit is not None:
            time.sleep(min(timeout_s, _LATE_S))
        else:
            self.local.wait(min(timeout_s, TICK_S))
        for rank in self.ranks[1:]:
            if rank.exit is None:
                self._read(rank, self._peers[rank.number])

    def _read(self, rank: Rank, peer: Peer) -> None:
        """Takes the state of a rank; one that has had no new state for 10 s is lost, before its first for a minute."""
        state = None if peer.is_lost else self._store.read(f"state/{self._number}/{rank.number}")
        silent_s = time.monotonic() - self._heard_s[rank.number]
        if state is not None and state["num_beats"] > self._num_beats[rank.number]:
            self._num_beats[rank.number], self._heard_s[rank.number] = state["num_beats"], time.monotonic()
            rank.result, rank.stack, rank.log, rank.phase = (state[key] for key in ("result", "stack", "log", "phase"))
            rank.usage = None if state["usage"] is None else Usage(**state["usage"])
            rank.exit = None if state["exit"] is None else Exit(**state["exit"])
            peer.has_answered = rank.exit is None or rank.exit.code is not None
        elif peer.is_lost or silent_s > (limit_s := LOST_S if peer.has_answered else JOIN_S):
            since = "since an earlier case" if peer.is_lost else f"for {limit_s:g} s"
            message = f"its process on machine {peer.host} did not answer {since}."
            peer.is_lost = rank.is_lost = True
            error = {"kind": "LauncherDied", "message": message, "phase": None}
            rank.result = {"outcome": "crashed", "error": error}
            rank.exit = Exit(pid=None, code=1, max_rss_bytes=None)
        elif silent_s > _STALE_S:
            rank.usage = None

    def look(self) -> None:
        """Takes the usage of rank 0; that of the others came with their states."""
        self.local.look()

    def dump(self) -> None:
        """Has every rank that runs write its stack."""
        self.local.dump()
        self._num_dumps += 1
        self._order(kill=False)

    def take_stacks(self) -> None:
        """Reads the stack of rank 0; those of the others came with their states."""
        self.local.take_stacks()

    def kill(self) -> None:
        """Kills every rank that runs."""
        self.local.kill()
        self._order(kill=True)

    def _order(self, *, kill: bool) -> None:
        self._store.write(f"order/{self._number}", {"num_dumps": self._num_dumps, "kill": kill})

    def abandon(self) -> None:
        """Notes that whoever has not ended will not be waited for."""
        self.local.abandon()
        for rank in self.ranks[1:]:
            rank.exit = rank.exit or Exit(pid=None, code=1, max_rss_bytes=None)
