"""The process of the fork server: imports once, then forks on request. ``rlhfbench.runs.forkserver`` is its client.

It touches no device, runs no parallel op and starts no thread (BLAS libraries start theirs and handle a fork), so a
forked process behaves like a freshly started one.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import itertools
import json
import mmap
import os
import selectors
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhfbench.processes import die_with_parent

KNOWN = ("where", "scratch")  # messages that servers of older revisions do not know
MAX_FDS = 200  # of one message: Linux passes at most 253
_PAGE_BYTES = 256
_HEADER = struct.Struct("<I?B")  # of a page: phases entered, whether it is stepping, bytes of the phase's name

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


class _Child:
    """One forked process.

    Attributes:
        pid: of the process, and of its group.
        number: among the processes of its case.
        page: shared memory that holds the phase it is in, and how many it has entered.
    """

    def __init__(self, pid: int, number: int, page: mmap.mmap) -> None:
        self.pid, self.number, self.page = pid, number, page

    def kill(self) -> None:
        """Kills the process and all that it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def phase(self) -> str | None:
        """The phase that the process announced last."""
        _, _, length = _HEADER.unpack_from(self.page)
        return self.page[_HEADER.size : _HEADER.size + length].decode(errors="replace") or None

    def where(self) -> tuple[int, bool, str | None]:
        """The number of phases that the process has announced, whether it is stepping, and the last phase."""
        num_phases, is_stepping, _ = _HEADER.unpack_from(self.page)
        return num_phases, is_stepping, self.phase()


class _Server:
    """The server: one thread that selects over the client's socket and the signals."""

    def __init__(self, control: socket.socket, target: Target) -> None:
        self._control, self._target = control, target
        self._lines = Lines()
        self._fds: list[int] = []
        self._children: dict[int, _Child] = {}
        self._scratch: list[str] = []

    def serve(self) -> None:
        """Forks on request until the client is gone or SIGTERM arrives; then kills the case and removes its files."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # only signals with a handler reach the wakeup descriptor
        signal.set_wakeup_fd(wake_write)
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(wake_read, selectors.EVENT_READ)
            self._tell({"ready": True, "knows": list(KNOWN)})
            try:
                while True:
                    ready = {key.fileobj for key, _ in selector.select()}
                    # First: it may name a folder to remove, and a signal may have come in the same moment.
                    if self._control in ready and not self._on_request():
                        return
                    if wake_read in ready:
                        if signal.SIGTERM in os.read(wake_read, 512):
                            return
                        self._reap()
            finally:
                self._kill()
                for pid in self._children:
                    os.waitpid(pid, 0)  # until then it may write
                for folder in self._scratch:
                    shutil.rmtree(folder, ignore_errors=True)

    def _on_request(self) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(self._control, 65536, MAX_FDS)
        except ConnectionError:
            return False
        self._fds += fds
        for message in self._lines.feed(data):
            if "kill" in message:
                self._kill()
            elif "dump" in message:
                for child in self._children.values():
                    os.kill(child.pid, signal.SIGUSR1)
            elif "where" in message:
                self._tell({"where": [[child.number, *child.where()] for child in self._children.values()]})
            elif "scratch" in message:
                self._scratch = [*filter(os.path.isdir, self._scratch), message["scratch"]]
            else:
                self._fork_all(message["run"])
        return bool(data)

    def _fork_all(self, requests: Message | list[Message]) -> None:
        """Forks a process for each request, whose descriptors came in pairs: its pipe and its log.

        What the processes of a case import alike is imported here first, once for them and for later cases.
        """
        fds, self._fds = self._fds, []
        for name in requests[0]["preload"] if isinstance(requests, list) else ():
            with suppress(ImportError):  # the case says what it lacks
                importlib.import_module(name)
        for number, request in enumerate(requests if isinstance(requests, list) else [requests]):
            self._fork(number, request, fds[2 * number], fds[2 * number + 1], fds)
        for fd in fds:
            os.close(fd)

    def _fork(self, number: int, request: Message, pipe: int, log: int, fds: list[int]) -> None:
        page = mmap.mmap(-1, _PAGE_BYTES)
        server_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                self._control.close()
                for fd in fds:
                    if fd not in (pipe, log):
                        os.close(fd)  # a pipe of another process would stay open when that one ends
                _become_case(server_pid, log)
                self._target(request, _sender(pipe, page))
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                _flush_and_exit(code)
        with suppress(OSError):  # set on both sides: whichever comes first
            os.setpgid(pid, pid)
        self._children[pid] = _Child(pid, number, page)
        self._tell({"pid": pid, "child": number})

    def _reap(self) -> None:
        for child in list(self._children.values()):
            self._reap_one(child)

    def _reap_one(self, child: _Child) -> None:
        can_peek = hasattr(os, "waitid")  # on macOS from Python 3.13 on
        if can_peek:
            # A zombie stays, whose process group cannot be reused: killing the group hits only its own processes.
            if os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return
            child.kill()
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid == 0:
            return
        if not can_peek:
            child.kill()  # at once, before the system gives the number to another process
        del self._children[pid]
        unit = 1 if sys.platform == "darwin" else 1024
        code, peak = os.waitstatus_to_exitcode(status), usage.ru_maxrss * unit
        self._tell({"exit": code, "max_rss_bytes": peak, "child": child.number, "phase": child.phase()})
        child.page.close()

    def _kill(self) -> None:
        for child in self._children.values():
            child.kill()

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
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=False)
    import resource  # here, as Windows has none and imports this module for one sentence

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # writing gigabytes of core dump takes longer than the case
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # Linux kills the case before the harness


def _sender(pipe: int, page: mmap.mmap) -> Callable[[Message], None]:
    """The function that a process sends its messages with.

    ``{"phase": name, "is_stepping": flag}`` is no line of its own: it is kept in shared memory, and told with the exit
    status or on request. It takes about a microsecond and wakes no one, so that timed steps can send it.
    """
    num_phases = itertools.count(1)

    def send(message: Message) -> None:
        if "phase" in message:
            name = message["phase"].encode()[: min(_PAGE_BYTES - _HEADER.size, 255)]
            header = _HEADER.pack(next(num_phases), message.get("is_stepping", False), len(name))
            page[: len(header) + len(name)] = header + name
        else:
            _write_line(pipe, message)

    return send


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
    _flush_and_exit(0)  # the clean-up of torch's modules takes a second


if __name__ == "__main__":
    main(sys.argv[1])
