"""The client of the fork server, which imports heavy packages once and forks a fresh process for every case.

The fork server of ``multiprocessing`` does not fit: it runs the caller's ``__main__`` again, so a script without a
guard starts itself over and over; it reports no resource usage; and it leaves processes behind a killed harness.

Client and server share a socket for requests, exit statuses and the two file descriptors of a case: its result pipe
and its log. Each case writes its messages to its own pipe, one JSON line each: a case that is killed while it writes
spoils only its own last line.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, Self

from rlhfbench.errors import ForkServerError
from rlhfbench.runs.faults import last_line
from rlhfbench.runs.forkserver_process import MAX_FDS, Lines, Message
from rlhfbench.runs.job import KILL_WAIT_S, Exit, Job, finish

WORKER = "rlhfbench.runs.worker:run_case"
PRELOAD = ("torch", "transformers", "peft", "rlhfkernels.training.step", "rlhfbench.measure.measurements")
# Optional: the versions of transformers, of PEFT or of this package (a gate's base) may lack what it needs.
WARM = ("rlhfkernels.models.warm",)
# The kernel kills the server when the thread ends that started it, and not only when this process does.
_LASTING_THREAD = ThreadPoolExecutor(1)


class ForkServer:
    """Starts the server and runs cases in it, one at a time. The server and its case die with this process.

    Args:
        target: ``module:function`` that a forked process calls with (request, send).
        preload: modules that the server imports before it forks.
        optional: modules that it also imports if they exist.
        paths: folders that its modules are looked for in first: those of another revision of the code.

    Attributes:
        knows: names of what this version of the server can do.
        start_s: seconds of its last start; 0 before.
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
        self.knows = frozenset[str]()
        self.start_s = 0.0

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
        started_s = time.monotonic()
        ours, theirs = socket.socketpair()
        self._control, self._lines = ours, Lines()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- closed in close()
        config = json.dumps({**self._config, "fd": theirs.fileno(), "parent_pid": os.getpid()})
        # -P: a random.py in the user's folder must not replace the standard library's.
        # A session of its own: Ctrl-C in the terminal reaches the harness only, which then ends the case.
        command = [sys.executable, "-P", "-m", "rlhfbench.runs.forkserver_process", config]

        def popen() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
                env=self._environment(),
            )

        is_main = threading.current_thread() is threading.main_thread()
        self._process = popen() if is_main else _LASTING_THREAD.submit(popen).result()
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
        self.knows = frozenset(ready.get("knows", ()))
        self.start_s = time.monotonic() - started_s

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
                self._process.wait(KILL_WAIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def kill(self) -> None:
        """Has the server kill a case that runs and all that it started, and end; for another thread than ``run``'s."""
        if self._process is not None:
            self._process.terminate()

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Makes a folder for the block. Where this process is killed, the server removes it."""
        self.start()
        with tempfile.TemporaryDirectory(prefix="rlhfbench-", ignore_cleanup_errors=True) as folder:
            if "scratch" in self.knows:
                self.send({"scratch": folder})
            yield Path(folder)

    def run(
        self,
        request: Message,
        *,
        log_path: Path,
        timeout_s: float | None = None,
        on_message: Callable[[Message], None] = lambda message: None,
    ) -> Exit:
        """Runs one process until it exits, crashes or is killed; see ``rlhfbench.runs.ranks`` for several.

        Args:
            request: JSON object for the target.
            log_path: receives standard output and standard error of the case.
            timeout_s: seconds from now after which the case is killed.
            on_message: called with each message of the case at once.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self.job([request], [log_path], lambda number, message: on_message(message)) as job:
            finish(job, deadline)
            assert job.exits[0] is not None
            return job.exits[0]

    @contextmanager
    def job(
        self, requests: Sequence[Message], log_paths: Sequence[Path], on_message: Callable[[int, Message], None]
    ) -> Iterator[Job]:
        """Forks one process for each of ``requests``, and yields them; they are killed where the block fails.

        Args:
            requests: JSON objects for the target.
            log_paths: receive standard output and standard error of each process, in place of what they hold.
            on_message: called with the number of a process and each of its messages.
        """
        self.start()
        assert self._control is not None
        with ExitStack() as opened:
            pipes = [os.pipe() for _ in requests]
            for read_end, _ in pipes:
                opened.callback(os.close, read_end)
            with ExitStack() as sent:
                for _, write_end in pipes:
                    sent.callback(os.close, write_end)
                for path in log_paths:
                    path.write_bytes(b"")  # what an earlier try of the case wrote says nothing of this one's end
                logs = [sent.enter_context(path.open("ab")).fileno() for path in log_paths]
                fds = [fd for (_, write_end), log in zip(pipes, logs, strict=True) for fd in (write_end, log)]
                # One request alone is sent as servers of older revisions take it.
                server_died = not self.send({"run": requests[0] if len(requests) == 1 else list(requests)}, fds)
            job = Job(self, self._control, [read_end for read_end, _ in pipes], on_message)
            try:
                if server_died:
                    job.abandon()
                yield job
            except BaseException:
                self.close()
                raise
            if any(found is not None and found.code is None for found in job.exits):
                self.close()

    def send(self, message: Message, fds: Sequence[int] = ()) -> bool:
        """Sends a message with file descriptors; returns False if the server is gone."""
        assert self._control is not None
        data = json.dumps(message).encode() + b"\n"
        try:
            for start in range(0, len(fds), MAX_FDS):  # each part comes with white space before the message
                socket.send_fds(self._control, [b" "], fds[start : start + MAX_FDS])
            self._control.sendall(data)
        except OSError:
            return False
        return True

    def receive(self) -> list[Message] | None:
        """The messages of one read; ``None`` if the server is gone."""
        assert self._control is not None
        try:
            data = self._control.recv(65536)
        except ConnectionError:
            data = b""
        return self._lines.feed(data) if data else None

    def _receive_one(self) -> Message | None:
        while (messages := self.receive()) is not None:
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
