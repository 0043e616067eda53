"""A process that a launcher started for another rank than 0: it starts its rank of every case that rank 0 sends."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from rlhfbench.launch import Launch, find_launch
from rlhfbench.runs.faults import Rank
from rlhfbench.runs.forkserver_process import Message
from rlhfbench.runs.hangs import TICK_S
from rlhfbench.runs.ranks import LocalRanks, Server, rank_request
from rlhfbench.runs.rendezvous import LOST_S, SharedStore, join
from rlhfbench.runs.supervise import wait_for_end

_MAX_LOG_CHARS = 2000


@functools.cache
def follower() -> Follower:
    """The follower of rank 0, in the process of another rank that a launcher started.

    Raises:
        SweepError: see ``SharedStore`` and ``join``.
    """
    launch = find_launch()
    assert launch is not None, "a launcher started this process"
    return Follower(launch)


class Follower:
    """A process of another rank, which starts its rank of every case that rank 0 sends.

    Args:
        launch: of this process; not rank 0.

    Raises:
        SweepError: see ``SharedStore`` and ``join``.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch, self._store = launch, SharedStore(launch)
        self._num_messages = 0
        join(self._store, launch)

    def follow(self, server: Server) -> None:
        """Runs this process's rank of every case of a run, until rank 0 sends the end.

        Args:
            server: forks the ranks.

        Raises:
            SweepError: rank 0 is gone.
        """
        while True:
            message = self._store.wait(f"message/{self._num_messages + 1}", LOST_S)
            if message is None:  # the present case goes on without this rank
                continue
            self._num_messages += 1
            if "end" in message:
                self._store.write(f"bye/{self._num_messages}/{self._launch.rank}")
                return
            if self._launch.rank < message["size"]:
                self._run_own(server, self._num_messages, message)

    def _run_own(self, server: Server, number: int, message: dict[str, Any]) -> None:
        """Runs this process's rank of one case, and writes its state to the store."""
        request = own_request(self._launch, message)
        with server.scratch() as folder:
            log_path = folder / "log"
            ranks = LocalRanks([log_path], lambda told: None)
            (rank,) = ranks.ranks
            num_beats, num_dumps = 0, 0
            with server.job([request], [log_path], ranks.take) as ranks.job:
                while rank.exit is None:
                    ranks.wait(TICK_S / 2)
                    order = self._store.read(f"order/{number}") or {"num_dumps": 0, "kill": False}
                    if order["num_dumps"] > num_dumps:
                        num_dumps = order["num_dumps"]
                        ranks.dump()
                        wait_for_end(ranks, TICK_S / 4)
                        ranks.take_stacks()
                    if order["kill"]:
                        ranks.kill()
                    ranks.look()
                    num_beats += 1
                    self._store.write(f"state/{number}/{self._launch.rank}", _state(rank, log_path, num_beats))


def _state(rank: Rank, log_path: Path, num_beats: int) -> dict[str, Any]:
    """The state of a rank that rank 0 reads; ``num_beats`` tells one state from the next."""
    return {
        "num_beats": num_beats,
        "usage": None if rank.usage is None else dataclasses.asdict(rank.usage),
        "phase": rank.phase,
        "result": rank.result,
        "stack": rank.stack,
        "log": log_path.read_text(errors="replace")[-_MAX_LOG_CHARS:],
        "exit": None if rank.exit is None else dataclasses.asdict(rank.exit),
    }


def own_request(launch: Launch, message: Message) -> Message:
    """The request of this process's rank, from the message of a case."""
    return rank_request(
        message["request"],
        launch.rank,
        message["size"],
        launch.local_rank,
        launch.num_local(message["size"]),
        message["address"],
        message["timeout_s"],
    )
