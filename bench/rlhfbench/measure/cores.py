"""Cores that processes which take turns share, where the system lets one bind a process (Linux).

The scheduler keeps a process on the core where it ran last, so each of two that take turns stays on a core of its own.
Cores of a shared machine differ in speed for minutes, by what runs beside them. Of a revision with itself, timed with
one thread in pairs of 3 s on two otherwise idle cores, the ratios of 47 pairs spread by 3.9 % (root mean square) where
the scheduler chose, up to 14 % in a pair, and those of 79 pairs by 2.6 % on shared cores.
"""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def draw_cores(num_cores: int, rng: random.Random) -> list[int] | None:
    """Draws neighbouring cores of those that this process may use.

    Args:
        num_cores: How many. A core comes with all of its hardware threads: the scheduler spreads a process over them
            as it would without a binding.
        rng: Draws the first.

    Returns:
        The numbers of their hardware threads; ``None`` where there are no more cores than that, or no bindings.
    """
    if not hasattr(os, "sched_getaffinity") or not hasattr(socket, "SO_PEERCRED"):
        return None
    cores: dict[str, list[int]] = {}
    for number in sorted(os.sched_getaffinity(0)):
        cores.setdefault(_siblings(number), []).append(number)
    if num_cores >= len(cores):
        return None
    grouped = list(cores.values())
    first = rng.randrange(len(grouped))
    return [number for at in range(num_cores) for number in grouped[(first + at) % len(grouped)]]


def _siblings(number: int) -> str:
    """The hardware threads of the core that has thread ``number``."""
    try:
        return Path(_TOPOLOGY.format(number)).read_text()
    except OSError:
        return str(number)


def bind_peer(connection: socket.socket, cores: Collection[int]) -> None:
    """Binds all threads of the process at the other end of a Unix socket to ``cores``."""
    size = struct.calcsize("3i")
    pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    with suppress(OSError):  # the process is gone
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # the thread is gone
                os.sched_setaffinity(int(thread.name), cores)
