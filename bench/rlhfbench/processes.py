"""Parallel map over processes, for work that is bound by Python.

Measured cases need a fresh process each and run in the fork server instead.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from rlhfbench.errors import ForkServerError
from rlhfbench.runs.forkserver_process import die_with_parent

Input = TypeVar("Input")
Output = TypeVar("Output")

_MAX_PROCESSES = 8  # each takes about half a gigabyte once torch is imported


def map_parallel(
    function: Callable[[Input], Output], inputs: Sequence[Input], *, preload: Sequence[str]
) -> list[Output]:
    """Returns ``function`` of each input, in order.

    Args:
        function: Picklable, like its argument, its result and its exceptions.
        inputs: One argument per call. A single input is computed in this process.
        preload: Modules that the fork server imports once for all processes.

    Raises:
        ForkServerError: A process died.
    """
    num_processes = min(len(inputs), _num_cores(), _MAX_PROCESSES)
    if num_processes <= 1:
        return [function(item) for item in inputs]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with ProcessPoolExecutor(num_processes, context, initializer=_start) as pool:
        try:
            return list(pool.map(function, inputs))
        except BrokenProcessPool as error:
            raise ForkServerError("a worker process was killed: the machine may be out of memory.") from error


def _num_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start() -> None:
    """Lets Ctrl-C end a worker without a traceback, and the parent's death end it too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent(os.getppid(), signal.SIGKILL)
