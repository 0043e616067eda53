"""The store at which the processes of a launcher join, with an end to every wait for it."""

from __future__ import annotations

import datetime
import json
import platform
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from rlhfbench.errors import SweepError
from rlhfbench.launch import Launch
from rlhfbench.network import address_toward, outer_address
from rlhfbench.runs import versions

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")
JOIN_S = 60.0  # seconds within which all processes must have joined
LOST_S = 10.0  # seconds without an answer after which a process is gone
_POLL_S = 0.05  # a case begins so much later at most; a look takes less than 1 ms


class SharedStore:
    """A store that all processes of a launcher share, torchrun's or one that rank 0 opens.

    torch waits for ever for an answer of a store behind a network that does not work any more. So a thread of its own
    asks, and the caller waits for it.

    Args:
        launch: of this process.

    Raises:
        SweepError: the port is in use, or rank 0 does not answer within a minute.
    """

    def __init__(self, launch: Launch) -> None:
        self._store = _connect(launch)
        self._questions: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while True:
            answer, question = self._questions.get()
            try:
                answer.set_result(question())
            except BaseException as error:
                answer.set_exception(error)

    def _ask(self, question: Callable[[], T], within_s: float = LOST_S) -> T:
        from torch.distributed import DistError

        answer: Future[T] = Future()
        self._questions.put((answer, question))
        try:
            return answer.result(within_s)
        except (TimeoutError, DistError) as error:
            raise SweepError(["the process of rank 0 is gone, or its machine cannot be reached."]) from error

    def write(self, key: str, value: Mapping[str, Any] | None = None) -> None:
        """Writes a JSON object under a key, by default an empty one.

        Raises:
            SweepError: rank 0 is gone.
        """
        self._ask(lambda: self._store.set(key, json.dumps(value or {})))

    def read(self, key: str) -> dict[str, Any] | None:
        """The object of a key; ``None`` if there is none yet.

        Raises:
            SweepError: rank 0 is gone.
        """
        return self._ask(lambda: json.loads(self._store.get(key)) if self._store.check([key]) else None)

    def wait(self, key: str, for_s: float) -> dict[str, Any] | None:
        """The object of a key, once it is there; ``None`` if it is not within ``for_s``.

        It looks again and again, as torch logs a warning whenever a wait of its own ends without an answer.

        Raises:
            SweepError: rank 0 is gone.
        """
        until_s = time.monotonic() + for_s
        while (found := self.read(key)) is None and time.monotonic() < until_s:
            time.sleep(_POLL_S)
        return found


def _connect(launch: Launch) -> Store:
    from torch._C._distributed_c10d import PrefixStore, TCPStore
    from torch.distributed import DistError

    where = f"{launch.host}:{launch.port}"
    try:
        store = TCPStore(
            launch.host,
            launch.port,
            is_master=launch.rank == 0 and not launch.has_store,
            timeout=datetime.timedelta(seconds=JOIN_S),
            wait_for_workers=False,
        )
    except (DistError, OSError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise SweepError([f"MASTER_PORT is {launch.port}: it is in use on this machine."]) from error
        raise SweepError([f"the launcher's address is {where}: no process of rank 0 answers there."]) from error
    # Without the job's name a process would run the cases of another job, whose rank 0 took the port first.
    return PrefixStore(f"rlhfbench/{launch.job}/{launch.attempt}", store)


def join(store: SharedStore, launch: Launch) -> None:
    """Tells the others of this process: its machine, the address there, and the version of the package.

    Raises:
        SweepError: rank 0 did not join within a minute.
    """
    machine = {"host": platform.node(), "address": address_toward(launch.host), "installed": versions.installed()}
    store.write(f"here/{launch.rank}", machine)
    if store.wait("here/0", JOIN_S) is None:
        where = f"{launch.host}:{launch.port}"
        raise SweepError([f"the launcher's address is {where}: this job's process of rank 0 does not answer there."])


def machines(store: SharedStore, launch: Launch) -> dict[int, dict[str, Any]]:
    """The machines of the other ranks, once all have joined.

    Raises:
        SweepError: one did not join within a minute, or has another version of the package.
    """
    until_s = time.monotonic() + JOIN_S
    found = {rank: store.wait(f"here/{rank}", max(until_s - time.monotonic(), 0.1)) for rank in range(1, launch.size)}
    missing = [rank for rank, machine in found.items() if machine is None]
    if missing:
        raise SweepError(f"the launcher's process of rank {rank} did not join within {JOIN_S:g} s." for rank in missing)
    there = {rank: machine for rank, machine in found.items() if machine is not None}
    installed = {machine["host"]: _as_installed(machine["installed"]) for machine in there.values()}
    problems = versions.version_problems(versions.installed(), installed)
    if problems:
        raise SweepError(problems)
    return there


def _as_installed(found: list[str] | None) -> versions.Installed:
    return None if found is None else (found[0], found[1])


def own_address(launch: Launch, others: Mapping[int, Mapping[str, Any]]) -> str:
    """The address of rank 0's machine that every rank can connect to.

    Args:
        launch: of rank 0.
        others: see ``machines``.
    """
    addresses = [machine["address"] for machine in others.values() if machine["address"] is not None]
    return outer_address([launch.host, *addresses]) or launch.host
