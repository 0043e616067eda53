"""The client of the fork server, which imports heavy packages once and forks a fresh process for every case.

The fork server of ``multiprocessing`` does not fit: it runs the caller's ``__main__`` again, so a script without a
guard starts itself over and over; it reports no resource usage; and it leaves processes behind a killed harness.

Client and server share a socket for requests, exit statuses and the two file descriptors of a case: its result pipe
and its log. Each case writes its messages to its own pipe, one JSON line each: a case that is killed while it writes
spoils only its own last line.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Self

from rlhfbench.errors import ForkServerError
from rlhfbench.runs.forkserver_process import Lines, Message

WORKER = "rlhfbench.runs.worker:run_case"
PRELOAD = ("torch", "transformers", "peft", "rlhfkernels.training.step", "rlhfbench.measure.measurements")
# Optional: the versions of transformers, of PEFT or of this package (a gate's base) may lack what it needs.
WARM = ("rlhfkernels.models.warm",)
_DIED: Message = {"exit": None, "max_rss_bytes": None}  # the exit status when the server died with the case
_KILL_WAIT_S = 10.0  # seconds that a killed process may take to exit before the server is killed


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Exit:
    """The end of a case's process.

    Attributes:
        pid: process id; ``None`` if it was never started.
        code: exit code, negative for the signal that killed it; ``None`` if the server died with it.
        max_rss_bytes: largest resident set. It includes what the server held when it forked.
        timed_out: the client killed it at its timeout.
    """

    pid: int | None
    code: int | None
    max_rss_bytes: int | None
    timed_out: bool = False


class ForkServer:
    """Starts the server and runs cases in it, one at a time. The server and its case die with this process.

    Args:
        target: ``module:function`` that a forked process calls with (request, send).
        preload: modules that the server imports before it forks.
        optional: modules that it also imports if they exist.
        paths: folders that its modules are looked for in first: those of another revision of the code.
    """

    def __init__(
        self,
        *,
        target: str = WORKER,
        preload: Sequence[str] = PRELOAD,
        optional: Sequence[str] = (),
        paths: Sequence[str] = (),
    ) -> None:
        self._config = {"target": target, "preload": list(preload), "optional": list(optional)}
        self._paths = list(paths)
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
        """Process id of the server; ``None`` unless it is alive."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Starts the server unless it is alive, and waits until it has imported everything.

        Raises:
            ForkServerError: the server did not start.
        """
        if self.pid is not None:
            return
        self.close()
        ours, theirs = socket.socketpair()
        self._control, self._lines = ours, Lines()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- closed in close()
        config = json.dumps({**self._config, "fd": theirs.fileno(), "parent_pid": os.getpid()})
        # -P: a random.py in the user's folder must not replace the standard library's.
        # A session of its own: Ctrl-C in the terminal reaches the harness only, which then ends the case.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rlhfbench.runs.forkserver_process", config],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            env=self._environment(),
        )
        theirs.close()
        ready = None
        try:
            ready = self._receive_one()
            last_line_of_log = self._last_line_of_log()
        finally:
            if ready is None:
                self.close()
        if ready is None:
            raise ForkServerError(f"the fork server did not start: {last_line_of_log}")

    def _environment(self) -> dict[str, str]:
        environment = worker_environment(os.environ)
        if self._paths:
            given = environment.get("PYTHONPATH")
            environment["PYTHONPATH"] = os.pathsep.join([*self._paths, *([given] if given else [])])
        return environment

    def close(self) -> None:
        """Ends the server and a case that still runs."""
        if self._control is not None:
            self._control.close()  # at the end of the socket the server kills its case and exits
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

    def kill(self) -> None:
        """Kills the server and with it a case that runs, from another thread than that of ``run``."""
        if self._process is not None:
            self._process.kill()

    def run(
        self,
        request: Message,
        *,
        log_path: Path,
        timeout_s: float | None = None,
        on_message: Callable[[Message], None] = lambda message: None,
    ) -> Exit:
        """Runs one case until it exits, crashes or is killed.

        Args:
            request: JSON object for the target.
            log_path: receives standard output and standard error of the case.
            timeout_s: seconds from now after which the case is killed.
            on_message: called with each message of the case at once.
        """
        self.start()
        read_end, write_end = os.pipe()
        try:
            with log_path.open("ab") as log:
                server_died = not self._send({"run": request}, [write_end, log.fileno()])
            os.close(write_end)
            write_end = -1
            if server_died:
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
        """Waits for messages and for the end of the case, without polling; kills the case at its timeout."""
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
                    selector.unregister(pipe)  # closed by the case; the exit status follows
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
        """Sends a message with file descriptors; returns False if the server is gone."""
        assert self._control is not None
        data = json.dumps(message).encode() + b"\n"
        try:
            sent = socket.send_fds(self._control, [data], fds) if fds else 0
            self._control.sendall(data[sent:])
        except OSError:
            return False
        return True

    def _receive(self) -> list[Message] | None:
        """The messages of one read from the server; ``None`` if it is gone."""
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

    def _last_line_of_log(self) -> str:
        assert self._log is not None
        self._log.seek(0)
        return last_line(self._log.read().decode(errors="replace")) or "its log is empty."


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of the fork server, which sets how long idle threads of GNU OpenMP spin before they sleep.

    The library's default spins for milliseconds, which is harmless on idle cores and ruinous beside another process.
    A Hydra-PPO step on ``tiny`` (64 + 64 tokens, batch 4, 2 threads on 2 cores): 0.31 s by default, 0.32 s with 1000
    spins and 0.56 s with ``OMP_WAIT_POLICY=passive`` on idle cores; 8 to 15 s, 2.0 to 2.7 s and 2.9 to 3.4 s beside
    other jobs. A user's own setting wins.
    """
    if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        return dict(environment)
    return {**environment, "GOMP_SPINCOUNT": "1000"}


def last_line(text: str) -> str:
    """The last line of ``text`` that is not blank, at most 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _pump(pipe: int, lines: Lines, on_message: Callable[[Message], None]) -> bool:
    """Passes on the messages of one read; returns False at the end of the pipe, or if a non-blocking pipe is empty."""
    try:
        data = os.read(pipe, 65536)
    except BlockingIOError:
        return False
    for message in lines.feed(data):
        on_message(message)
    return bool(data)


def _drain(pipe: int, lines: Lines, on_message: Callable[[Message], None]) -> None:
    """Passes on the rest of ``pipe`` without waiting: a process that the case started may keep it open."""
    os.set_blocking(pipe, False)
    while _pump(pipe, lines, on_message):
        pass
