"""One function for several inputs, on as many processes as there are cores: for what computes in Python alone.

Unlike a case that is measured, nothing here needs a process of its own: the standard library's pool does.
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

_MAX_PROCESSES = 8  # half a gigabyte each


def map_parallel(
    function: Callable[[Input], Output], inputs: Sequence[Input], *, preload: Sequence[str]
) -> list[Output]:
    """``function`` of each of ``inputs``, in their order.

    Args:
        function: can be pickled, as can what it takes, returns and raises.
        inputs: what it is called with; one is handled here.
        preload: modules that are imported once for all processes.

    Raises:
        ForkServerError: a process died.
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
            raise ForkServerError("a process that shared the work was killed: is the machine's memory out?") from error


def _num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start() -> None:
    """Ctrl-C ends a worker without a word, and so does the end of whoever wanted its results."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent(os.getppid(), signal.SIGKILL)
