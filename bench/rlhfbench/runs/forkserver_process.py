"""The process of the fork server: imports once, then forks on request. ``rlhfbench.runs.forkserver`` is its client.

It touches no device, runs no parallel op and starts no thread (BLAS libraries start theirs and handle a fork), so a
forked process behaves like a freshly started one.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhfbench.processes import die_with_parent

Message = dict[str, Any]
Target = Callable[[Message, Callable[[Message], None]], None]


class Lines:
    """Splits a stream of bytes into JSON lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Message]:
        """Adds ``data`` and returns the lines that are now complete."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]


class _Server:
    """The server: one thread that selects over the client's socket and the signals."""

    def __init__(self, control: socket.socket, target: Target) -> None:
        self._control, self._target = control, target
        self._lines = Lines()
        self._fds: list[int] = []
        self._child: int | None = None

    def serve(self) -> None:
        """Forks on request until the client is gone or SIGTERM arrives; then kills the running case."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # only signals with a handler reach the wakeup descriptor
        signal.set_wakeup_fd(wake_write)
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(wake_read, selectors.EVENT_READ)
            self._tell({"ready": True})
            try:
                while True:
                    ready = {key.fileobj for key, _ in selector.select()}
                    if wake_read in ready:
                        if signal.SIGTERM in os.read(wake_read, 512):
                            return
                        self._reap()
                    if self._control in ready and not self._on_request():
                        return
            finally:
                self._kill()

    def _on_request(self) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(self._control, 65536, 2)
        except ConnectionError:
            return False
        self._fds += fds
        for message in self._lines.feed(data):
            if "kill" in message:
                self._kill()
            else:
                self._fork(message["run"])
        return bool(data)

    def _fork(self, request: Message) -> None:
        (pipe, log), self._fds = self._fds, []
        server_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                self._control.close()
                _become_case(server_pid, log)
                self._target(request, lambda message: _write_line(pipe, message))
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                _flush_and_exit(code)
        with suppress(OSError):  # set on both sides: whichever comes first
            os.setpgid(pid, pid)
        self._child = pid
        os.close(pipe)
        os.close(log)
        self._tell({"pid": pid})

    def _reap(self) -> None:
        if self._child is None:
            return
        can_peek = hasattr(os, "waitid")  # on macOS from Python 3.13 on
        if can_peek:
            # A zombie stays, whose process group cannot be reused: killing the group hits only its own processes.
            if os.waitid(os.P_PID, self._child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return
            self._kill()
        pid, status, usage = os.wait4(self._child, os.WNOHANG)
        if pid == 0:
            return
        if not can_peek:
            self._kill()  # at once, before the system gives the number to another process
        self._child = None
        unit = 1 if sys.platform == "darwin" else 1024
        self._tell({"exit": os.waitstatus_to_exitcode(status), "max_rss_bytes": usage.ru_maxrss * unit})

    def _kill(self) -> None:
        if self._child is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child, signal.SIGKILL)

    def _tell(self, message: Message) -> None:
        with suppress(OSError):  # a client that is gone is noticed at the next read
            self._control.sendall(json.dumps(message).encode() + b"\n")


def _become_case(server_pid: int, log: int) -> None:
    """Resets signals and isolates the forked process: it dies alone, before the harness, and with its server."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with suppress(OSError):
        os.setpgid(0, 0)
    die_with_parent(server_pid, signal.SIGKILL)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(file=2)
    import resource  # here, as Windows has none and imports this module for one sentence

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # writing gigabytes of core dump takes longer than the case
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # Linux kills the case before the harness


def _write_line(fd: int, message: Message) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(fd, data) :]


def _flush_and_exit(code: int) -> None:
    """Exits a forked process without the clean-up of the server."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)


def main(argument: str) -> None:
    """Runs the server: imports, then serves."""
    config = json.loads(argument)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(config["parent_pid"], signal.SIGTERM)
    control = socket.socket(fileno=config["fd"])
    control.set_inheritable(False)
    # Packages call torch.cuda.is_available() when imported. Without this variable it initialises CUDA, and a process
    # that is forked afterwards cannot use the device.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    gc.disable()  # it would go over all modules again and again: a quarter of the time of the imports
    for name in config["preload"]:
        importlib.import_module(name)
    for name in config["optional"]:
        with suppress(ImportError):
            importlib.import_module(name)
    module, _, function = config["target"].partition(":")
    target = getattr(importlib.import_module(module), function)
    gc.enable()
    gc.collect()
    gc.freeze()  # a collection in a case does not copy the shared pages of imported modules
    _Server(control, target).serve()


if __name__ == "__main__":
    main(sys.argv[1])
