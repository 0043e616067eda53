"""The fork server: imports the heavy packages once, and forks a fresh, clean process from them for every case.

``multiprocessing`` has one too, but it runs the caller's ``__main__`` again (a script without a guard would start
itself over and over), tells no exit status with the resource usage, and leaves processes behind a killed harness.

Client and server share a socket: requests, the two descriptors of a case (its result pipe and its log) and exit
statuses pass there. A case writes its messages, one JSON line each, to a pipe of its own, so that a case that is
killed in the middle of a line garbles nothing but that line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Self

from rlhfbench.errors import ForkServerError
from rlhfbench.runs.forkserver_process import Lines, Message

WORKER = "rlhfbench.runs.worker:run_case"
PRELOAD = ("torch", "transformers", "peft", "rlhfkernels.training.step", "rlhfbench.measure.measurements")
_DIED: Message = {"exit": None, "max_rss_bytes": None}  # stands for the server's last message when it had none
_KILL_WAIT_S = 10.0  # how long a killed process may take to vanish before the server itself is ended


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Exit:
    """How a case's process ended.

    Attributes:
        pid: its process id, ``None`` where it was never started.
        code: exit code, negative for the signal that killed it; ``None`` where the server died with it.
        max_rss_bytes: its largest resident set. It starts at what the server held when it forked, not at 0.
        timed_out: the client killed it because its time was over.
    """

    pid: int | None
    code: int | None
    max_rss_bytes: int | None
    timed_out: bool = False


class ForkServer:
    """Starts the server and has cases run by it, one at a time. Everything it started dies with this process.

    Args:
        target: ``module:function`` that a forked process calls with (request, send).
        preload: modules that the server imports before it forks.
        optional: modules that it imports too where they exist.
    """

    def __init__(self, *, target: str = WORKER, preload: Sequence[str] = PRELOAD, optional: Sequence[str] = ()) -> None:
        self._config = {"target": target, "preload": list(preload), "optional": list(optional)}
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._log: BinaryIO | None = None
        self._lines = Lines()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The server's process id while it lives."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Starts the server where none is alive, and waits until it has imported everything.

        Raises:
            ForkServerError: it did not come up.
        """
        if self.pid is not None:
            return
        self.close()
        ours, theirs = socket.socketpair()
        self._control, self._lines = ours, Lines()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- closed in close()
        config = json.dumps({**self._config, "fd": theirs.fileno(), "parent_pid": os.getpid()})
        # -P keeps the current folder out of sys.path: a user's random.py there is not ours to import.
        # A session of its own keeps the terminal's Ctrl-C from the cases: the harness ends them.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rlhfbench.runs.forkserver_process", config],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        theirs.close()
        ready = None
        try:
            ready = self._receive_one()
            words = self._last_words()
        finally:
            if ready is None:
                self.close()
        if ready is None:
            raise ForkServerError(f"the fork server did not start: {words}")

    def close(self) -> None:
        """Ends the server, and with it a case that still runs."""
        if self._control is not None:
            self._control.close()  # the server reads the end of the file, kills its case and exits
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(_KILL_WAIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def run(
        self,
        request: Message,
        *,
        log_path: Path,
        timeout_s: float | None = None,
        on_message: Callable[[Message], None] = lambda message: None,
    ) -> Exit:
        """Runs one case to its end, whatever the end is.

        Args:
            request: what the target gets; anything that JSON holds.
            log_path: the file that gets everything the case prints.
            timeout_s: when the case is killed, counted from here.
            on_message: called with each message of the case, as it comes.
        """
        self.start()
        read_end, write_end = os.pipe()
        try:
            with log_path.open("ab") as log:
                died = not self._send({"run": request}, [write_end, log.fileno()])
            os.close(write_end)
            write_end = -1
            if died:
                return Exit(pid=None, code=None, max_rss_bytes=None)
            return self._watch(read_end, timeout_s, on_message)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(read_end)
            if write_end >= 0:
                os.close(write_end)

    def _watch(self, pipe: int, timeout_s: float | None, on_message: Callable[[Message], None]) -> Exit:
        """Waits, asleep, for messages and for the end of the case; kills it when its time is over."""
        assert self._control is not None
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        timed_out = False
        pid: int | None = None
        messages = Lines()
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            selector.register(self._control, selectors.EVENT_READ)
            while True:
                left_s = None if deadline is None else max(deadline - time.monotonic(), 0.0)
                ready = {key.fileobj for key, _ in selector.select(left_s)}
                if pipe in ready and not _pump(pipe, messages, on_message):
                    selector.unregister(pipe)  # the case closed it; its exit status follows
                if self._control in ready:
                    for message in self._receive() or [_DIED]:
                        pid = message.get("pid", pid)
                        if "pid" not in message:
                            _drain(pipe, messages, on_message)
                            return self._exit(message, pid, timed_out=timed_out)
                if deadline is not None and time.monotonic() >= deadline:
                    if timed_out or not self._send({"kill": True}):
                        return self._exit(_DIED, pid, timed_out=True)
                    timed_out, deadline = True, time.monotonic() + _KILL_WAIT_S

    def _exit(self, message: Message, pid: int | None, *, timed_out: bool) -> Exit:
        if message is _DIED:
            self.close()
        return Exit(pid=pid, code=message["exit"], max_rss_bytes=message["max_rss_bytes"], timed_out=timed_out)

    def _send(self, message: Message, fds: Sequence[int] = ()) -> bool:
        """Whether the server got ``message`` and the descriptors with it."""
        assert self._control is not None
        data = json.dumps(message).encode() + b"\n"
        try:
            sent = socket.send_fds(self._control, [data], fds) if fds else 0
            self._control.sendall(data[sent:])
        except OSError:
            return False
        return True

    def _receive(self) -> list[Message] | None:
        """The messages of one read from the server, ``None`` at its end."""
        assert self._control is not None
        try:
            data = self._control.recv(65536)
        except ConnectionError:
            data = b""
        return self._lines.feed(data) if data else None

    def _receive_one(self) -> Message | None:
        while (messages := self._receive()) is not None:
            if messages:
                return messages[0]
        return None

    def _last_words(self) -> str:
        assert self._log is not None
        self._log.seek(0)
        return last_line(self._log.read().decode(errors="replace")) or "it said nothing."


def last_line(text: str) -> str:
    """The last line of ``text`` that is not blank, cut to 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _pump(pipe: int, lines: Lines, on_message: Callable[[Message], None]) -> bool:
    """Passes on what one read of ``pipe`` gives; False at its end, or where a non-blocking pipe is empty."""
    try:
        data = os.read(pipe, 65536)
    except BlockingIOError:
        return False
    for message in lines.feed(data):
        on_message(message)
    return bool(data)


def _drain(pipe: int, lines: Lines, on_message: Callable[[Message], None]) -> None:
    """Passes on what is left in ``pipe``, and does not wait: something that the case started may hold its other end."""
    os.set_blocking(pipe, False)
    while _pump(pipe, lines, on_message):
        pass
