"""Turns: two processes time their steps one after the other, so that drift and other load hit both alike.

The referee listens at two sockets and grants turns; each of the two processes connects to one of them, waits for a
turn, takes one step and says so. While one steps, the other sleeps.

A turn is a whole step. With one turn for each phase, the same phase of both runs 10 to 30 ms apart, and is known no
better: over pairs of 6 s with one thread of a revision with itself, the ratios of a phase differ by 15 % from round to
round either way, and the median error of a pair is 1.4 % in place of 0.9 %.
"""

from __future__ import annotations

import random
import select
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

from rlhfbench.measure.cores import bind_peer, draw_cores

_GO, _DONE = b"g", b"d"
_MIN_ROUNDS, _MAX_ROUNDS = 5, 1000
# A process that builds its step and warms up may take as long as this many turns.
_TURNS_TO_START = 2


class Turns:
    """The side of a process that steps.

    Args:
        path: Of the referee's socket.
    """

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        with suppress(OSError):  # the referee is gone: no turn will be granted
            self._socket.connect(path)

    def wait(self) -> bool:
        """Waits for a turn; returns ``False`` if there are no more, now and from then on."""
        with suppress(OSError):  # closed, or never connected
            if self._socket.recv(1) == _GO:
                return True
        self.close()
        return False

    def close(self) -> None:
        """Gives up all further turns."""
        self._socket.close()

    def done(self) -> None:
        """Ends a turn."""
        with suppress(OSError):  # noticed at the next wait
            self._socket.sendall(_DONE)


def run_in_turns(
    jobs: Sequence[Callable[[str], object]],
    folder: Path,
    budget_s: float,
    rng: random.Random,
    aborts: Sequence[Callable[[], object]],
    num_cores: int | None = None,
    turn_timeout_s: float | None = None,
) -> None:
    """Runs two jobs at once, each of which starts a process that steps in turns, until the budget is spent.

    A job that ends early, for example since its process failed, ends the other's turns too.

    Args:
        jobs: Each is called, in a thread of its own, with the path that its process makes ``Turns`` of.
        folder: An existing folder with a short path, which no one else can read.
        budget_s: Seconds of turns of all jobs together. There are 5 to 1000 rounds.
        rng: Draws which starts first, who goes first in each round, and the cores.
        aborts: Called when this call is interrupted: they end the jobs.
        num_cores: Cores that the processes share; ``None`` leaves them to the scheduler.
        turn_timeout_s: Seconds after which a turn that has not ended ends the turns of both: the side that waits is
            not held by the one that hangs. A process has twice that until it first waits for a turn. ``None`` for no
            limit.
    """
    with ExitStack() as opened:
        ended, told = map(opened.enter_context, socket.socketpair())
        paths = [folder / f"turns-{number}" for number in range(len(jobs))]
        listeners = [opened.enter_context(_listen(path)) for path in paths]
        pool = opened.enter_context(ThreadPoolExecutor(len(jobs)))
        futures: list[Future[object]] = []
        try:
            # The one that starts first may get the better memory.
            for job, path in rng.sample(list(zip(jobs, paths, strict=True)), len(jobs)):
                futures.append(pool.submit(job, str(path)))
                futures[-1].add_done_callback(lambda _: told.send(b"e"))
            _referee(listeners, ended, budget_s, rng, num_cores, turn_timeout_s)
            for future in futures:
                future.result()
        except BaseException:
            for abort in aborts:
                abort()
            raise
        finally:
            for path in paths:
                path.unlink(missing_ok=True)


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    return listener


def _referee(
    listeners: Sequence[socket.socket],
    ended: socket.socket,
    budget_s: float,
    rng: random.Random,
    num_cores: int | None,
    turn_timeout_s: float | None,
) -> None:
    """Grants turns once all have connected. At the end all connections are closed, which ends all turns."""
    started_s = time.monotonic()
    with ExitStack() as opened:
        players = []
        for listener in listeners:
            left_s = None
            if turn_timeout_s is not None:
                left_s = max(0.0, started_s + _TURNS_TO_START * turn_timeout_s - time.monotonic())
            ready, _, _ = select.select([listener, ended], [], [], left_s)
            if listener not in ready:
                for each in listeners:
                    each.close()
                return
            players.append(opened.enter_context(listener.accept()[0]))
            players[-1].settimeout(turn_timeout_s)
        if num_cores is not None and (cores := draw_cores(num_cores, rng)):
            for player in players:
                bind_peer(player, cores)
        spent_s, num_rounds = 0.0, 0
        while num_rounds < _MIN_ROUNDS or (spent_s < budget_s and num_rounds < _MAX_ROUNDS):
            started_s = time.monotonic()
            for player in rng.sample(players, len(players)):
                if not _grant(player):
                    return
            spent_s += time.monotonic() - started_s
            num_rounds += 1


def _grant(player: socket.socket) -> bool:
    """Grants one turn and waits for its end; returns ``False`` if the process is gone or takes too long."""
    try:
        player.sendall(_GO)
        return player.recv(1) == _DONE
    except OSError:
        return False
