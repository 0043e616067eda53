"""The lease of a node: a process that cannot reach the cluster any more ends itself, and the case that it runs."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

LEASE_S = 30.0  # shorter than Ray takes to find a node dead, about a minute: only then is the case tried elsewhere
ASK_S = 5.0
_CONNECT_S = 2.0


def keep_lease(address: str, end: Callable[[], object] = lambda: os._exit(1)) -> None:
    """Starts a thread that ends this process once the cluster's head has not answered for ``LEASE_S``.

    Args:
        address: ``HOST:PORT`` of the head.
        end: ends this process.
    """
    host, _, port = address.rpartition(":")
    threading.Thread(target=_watch, args=(host.strip("[]"), int(port), end), daemon=True).start()


def _watch(host: str, port: int, end: Callable[[], object]) -> None:
    pause = threading.Event()
    heard_s = time.monotonic()
    while True:
        if _answers(host, port):
            heard_s = time.monotonic()
        elif time.monotonic() - heard_s >= LEASE_S:
            break
        pause.wait(ASK_S)
    end()


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True
