"""Processes: parallel calls of a function, and children that die with their parent."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rlhfbench.errors import ForkServerError

Input = TypeVar("Input")
Output = TypeVar("Output")

MAX_PROCESSES = 8  # half a gigabyte each
_PR_SET_PDEATHSIG = 1
_PATH_LOCK = threading.Lock()


def map_parallel(
    function: Callable[[Input], Output],
    inputs: Sequence[Input],
    *,
    preload: Sequence[str],
    meanwhile: Callable[[], object] = lambda: None,
) -> list[Output]:
    """Calls ``function`` with each of ``inputs`` on all cores, for work in pure Python.

    Args:
        function: picklable, as are its inputs, results and errors.
        inputs: one argument per call. A single one is handled in this process.
        preload: modules that are imported once for all processes.
        meanwhile: called in this process while another one imports ``preload``; not called where none does.

    Returns:
        The results in the order of ``inputs``.

    Raises:
        ForkServerError: A process died.
    """
    num_processes = min(len(inputs), num_cores(), MAX_PROCESSES)
    if num_processes <= 1 or "forkserver" not in multiprocessing.get_all_start_methods():  # Windows has no such server
        return [function(item) for item in inputs]
    # Imported here: the fork server imports this module, and needs no pool.
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import forkserver, resource_tracker  # Windows has none

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with _safe_path():
        # The server inherits the mask: Ctrl-C while it imports would print its traceback. It ends with this process.
        resource_tracker.ensure_running()  # unblocks the signal when it starts
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    meanwhile()
    with ProcessPoolExecutor(num_processes, context, initializer=_start) as pool:
        try:
            return list(pool.map(function, inputs))
        except BrokenProcessPool as error:
            raise ForkServerError(
                "a worker process ended: the machine is out of memory, or a script calls this outside of "
                'if __name__ == "__main__".'
            ) from error


@contextmanager
def _safe_path() -> Iterator[None]:
    """Keeps the working folder off the path of Python processes that start in the block.

    A ``random.py`` of the user's must not replace the standard library's.
    """
    with _PATH_LOCK:  # another thread's "1" would be taken for what the user has set
        given = os.environ.get("PYTHONSAFEPATH")
        os.environ["PYTHONSAFEPATH"] = "1"
        try:
            yield
        finally:
            del os.environ["PYTHONSAFEPATH"]
            if given is not None:
                os.environ["PYTHONSAFEPATH"] = given


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start() -> None:
    """Has Ctrl-C and the death of the parent end a worker silently."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    die_with_parent(os.getppid(), signal.SIGKILL)


def die_with_parent(parent_pid: int, number: int) -> None:
    """Has the kernel send signal ``number`` to this process when its parent dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent_pid:  # the parent died before the call
        os._exit(1)


def num_oom_kills() -> int:
    """Number of times that Linux killed a process for memory since boot; 0 on other systems."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
