"""A job: the processes that the fork server forked for one case. A case over several ranks has one process for each."""

from __future__ import annotations

import dataclasses
import os
import selectors
import socket
import time
from collections.abc import Callable, Sequence, Set
from typing import Protocol

from rlhfbench.runs.forkserver_process import Lines, Message

KILL_WAIT_S = 10.0  # seconds that a killed process may take to exit before the server is killed
DIED: Message = {"exit": None, "max_rss_bytes": None}  # the exit status when the server died with the case


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Exit:
    """The end of a case's process.

    Attributes:
        pid: process id; ``None`` if it was never started.
        code: exit code, negative for the signal that killed it; ``None`` if the server died with it.
        max_rss_bytes: largest resident set. It includes what the server held when it forked.
        timed_out: the client killed it at its timeout.
        phase: phase of a step that the process had announced last, in timed steps too; ``None`` before the first.
    """

    pid: int | None
    code: int | None
    max_rss_bytes: int | None
    timed_out: bool = False
    phase: str | None = None


class Server(Protocol):
    """The connection to the fork server, as a job uses it."""

    @property
    def knows(self) -> Set[str]:
        """The messages, among those that came later, that the server of this revision knows."""

    def send(self, message: Message) -> bool:
        """Sends a message; returns ``False`` if the server is gone."""

    def receive(self) -> list[Message] | None:
        """The messages of one read; ``None`` if the server is gone."""


class Job:
    """The processes of one request, by number: 0 for the only one of a case without ranks.

    Args:
        server: forked the processes and tells how they ended.
        control: the socket of ``server``, to wait for.
        pipes: read ends of the processes' messages. The caller closes them.
        on_message: called with the number of a process and each of its messages, at once.

    Attributes:
        pids: process ids, once they are known.
        exits: how each process ended; ``None`` while it runs.
        places: phases that each process had entered when the server was asked last, whether it was stepping, and the
            last phase.
    """

    def __init__(
        self,
        server: Server,
        control: socket.socket,
        pipes: Sequence[int],
        on_message: Callable[[int, Message], None],
    ) -> None:
        self._server, self._control, self._on_message = server, control, on_message
        self._pipes, self._lines = list(pipes), [Lines() for _ in pipes]
        self._open = set(range(len(self._pipes)))
        self.pids: list[int | None] = [None] * len(self._pipes)
        self.exits: list[Exit | None] = [None] * len(self._pipes)
        self.places: list[tuple[int, bool, str | None]] = [(0, False, None)] * len(self._pipes)

    @property
    def is_over(self) -> bool:
        """True when every process has ended."""
        return None not in self.exits

    def wait(self, timeout_s: float | None) -> None:
        """Waits, without polling, until a message or an exit arrives, or for ``timeout_s``."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ, None)
            for number in self._open:
                selector.register(self._pipes[number], selectors.EVENT_READ, number)
            ready = [key.data for key, _ in selector.select(timeout_s)]
        for number in ready:
            if number is not None and not self._pump(number):
                self._open.discard(number)  # closed by the process; its exit status follows
        if None in ready:
            messages = self._server.receive()
            if messages is None:
                self.abandon()
            for message in messages or ():
                self._note(message)

    def abandon(self, *, timed_out: bool = False) -> None:
        """Notes that the server died, and with it every process that runs."""
        for number, found in enumerate(self.exits):
            if found is None:
                self._end(number, DIED, timed_out=timed_out)

    def kill(self) -> bool:
        """Kills every process and all that they started; returns ``False`` if the server is gone."""
        return self._server.send({"kill": True})

    def dump(self) -> None:
        """Has every process that runs write the stacks of its threads to its log."""
        self._server.send({"dump": True})

    def ask_where(self) -> None:
        """Asks for ``places``, which come with a later message."""
        if "where" in self._server.knows:
            self._server.send({"where": True})

    def _note(self, message: Message) -> None:
        number = message.get("child", 0)
        if "where" in message:
            for number, num_phases, is_stepping, phase in message["where"]:
                self.places[number] = num_phases, is_stepping, phase
        elif "pid" in message:
            self.pids[number] = message["pid"]
        else:
            self._end(number, message)

    def _end(self, number: int, message: Message, *, timed_out: bool = False) -> None:
        self._drain(number)
        self.exits[number] = Exit(
            pid=self.pids[number],
            code=message["exit"],
            max_rss_bytes=message["max_rss_bytes"],
            timed_out=timed_out,
            phase=message.get("phase"),
        )

    def _pump(self, number: int) -> bool:
        """Passes on the messages of one read; ``False`` at the end of the pipe, or if a non-blocking pipe is empty."""
        try:
            data = os.read(self._pipes[number], 65536)
        except BlockingIOError:
            return False
        for message in self._lines[number].feed(data):
            self._on_message(number, message)
        return bool(data)

    def _drain(self, number: int) -> None:
        """Passes on the rest of a pipe without waiting: a process that the case started may keep it open."""
        self._open.discard(number)
        os.set_blocking(self._pipes[number], False)
        while self._pump(number):
            pass


def finish(job: Job, deadline_s: float | None) -> None:
    """Waits until every process of ``job`` has ended, and kills them at ``deadline_s``, of the monotonic clock."""
    killed = False
    while not job.is_over:
        job.wait(None if deadline_s is None else max(deadline_s - time.monotonic(), 0.0))
        if deadline_s is not None and time.monotonic() >= deadline_s and not job.is_over:
            if killed or not job.kill():
                job.abandon(timed_out=True)
                return
            killed, deadline_s = True, time.monotonic() + KILL_WAIT_S
    if killed:
        job.exits = [found and dataclasses.replace(found, timed_out=True) for found in job.exits]
