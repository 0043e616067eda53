"""The executor of a cluster: places cases on nodes, collects what became of them, and tries again where a node is lost.

It knows a transport and not Ray, so that all of it is tested without a cluster.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlhfbench.cluster.agent import TRACES
from rlhfbench.cluster.nodes import Need, Node, no_node
from rlhfbench.cluster.placement import Claim, Placement, Work
from rlhfbench.runs import environment
from rlhfbench.runs.execution import Ended, Hosts, Start, Task
from rlhfbench.runs.progress import Progress
from rlhfkernels.config.case import Case

MAX_TRIES = 2
# A node whose process died is set aside for so long, in which Ray notices that it is gone. A Ray cluster of one machine
# takes 1 s for that.
SUSPECT_S = 10.0
REFRESH_S = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The answer of a node to a task.

    Attributes:
        fields: fields of ``Ended`` by name, without ``task`` and ``host``.
        files: content of the files that the task wrote: logs by their names, traces by their paths below ``TRACES``.
    """

    fields: Mapping[str, Any]
    files: Mapping[str, bytes]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """A task that no reply will come of.

    Attributes:
        reason: why, in a few words.
    """

    reason: str


class Transport(Protocol):
    """Carries tasks to nodes."""

    def submit(self, claim: Claim, task: Task) -> Hashable:
        """Sends a task to a node and returns a handle."""

    def wait(self, timeout_s: float) -> Sequence[tuple[Hashable, Reply | Lost]]:
        """Waits until tasks have ended, for some time at most, and returns them by their handles."""

    def nodes(self) -> Sequence[Node]:
        """The nodes that are there now and may run cases."""

    def close(self) -> None:
        """Ends every task."""


class ClusterExecutor:
    """Runs cases on the nodes of a cluster.

    Args:
        transport: carries tasks to nodes.
        need_of: what a case needs of a node.
        group_of: cases of one group run on one machine where one can hold them all.
        homes: names of the machines on which cases of a group ran earlier.
        progress: receives notices.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        need_of: Callable[[Case], Need],
        group_of: Callable[[Case], Hashable],
        progress: Progress,
        homes: Mapping[Hashable, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport, self._need_of, self._group_of = transport, need_of, group_of
        self._progress, self._homes, self._clock = progress, homes, clock
        self._suspects: dict[str, float] = {}  # ids of lost nodes, and when they were lost
        self._refreshed_s = clock()

    def start(self, *, round_s: float = 0.0) -> None:
        """Does nothing: each node imports what its cases need with its first case."""

    def close(self) -> None:
        """Ends every case."""
        self._transport.close()

    def can_run_on(self, host: str | None) -> bool:
        """True if the node of that name is there."""
        return any(node.name == host and node.id not in self._suspects for node in self._transport.nodes())

    def run(self, cases: Sequence[Case], start: Start, hosts: Hosts | None = None) -> Iterator[Ended]:
        """Runs the cases, as many at once as the nodes hold. See ``Executor.run``."""
        yield from _Round(self, cases, start, hosts or {}).run()

    def alive(self) -> list[Node]:
        """The nodes that are there and not set aside."""
        self._refreshed_s = self._clock()
        for node_id, since_s in list(self._suspects.items()):
            if self._clock() - since_s > SUSPECT_S:
                del self._suspects[node_id]
        return [node for node in self._transport.nodes() if node.id not in self._suspects]


class _Round:
    """One call of ``ClusterExecutor.run``."""

    def __init__(self, executor: ClusterExecutor, cases: Sequence[Case], start: Start, hosts: Hosts) -> None:
        self._executor, self._start = executor, start
        self._transport, self._progress = executor._transport, executor._progress
        self._placement = Placement(executor.alive(), executor._homes)
        self._works = [
            Work(case=case, need=executor._need_of(case), group=executor._group_of(case), host=hosts.get(case.id))
            for case in cases
        ]
        self._started: dict[str, Task] = {}  # tasks of cases that wait to be tried again
        self._running: dict[Hashable, tuple[Work, Task, Claim]] = {}
        self._homeless: list[Work] = []

    def run(self) -> Iterator[Ended]:
        """Runs all cases and yields each as it ends."""
        there = self._placement.nodes
        for work in self._placement.add(self._works):
            yield from self._without_node(work, there)
        self._works.clear()
        while True:
            self._submit()
            if not self._running and not self._homeless:
                return
            for handle, answer in self._transport.wait(REFRESH_S):
                work, task, claim = self._running.pop(handle)
                if isinstance(answer, Reply):
                    self._placement.release(claim)
                    _write_files(task, answer.files)
                    yield Ended(task=task, host=claim.node.name, **answer.fields)
                else:
                    yield from self._lost(work, task, claim.node, answer)
            if self._executor._clock() - self._executor._refreshed_s >= REFRESH_S:
                yield from self._refresh()

    def _submit(self) -> None:
        """Starts every case that has room."""
        while (placed := self._placement.next()) is not None:
            work, claim = placed
            task = self._started.pop(work.case.id, None) or self._start(work.case)
            if task is None:
                self._placement.release(claim)
            else:
                self._running[self._transport.submit(claim, task)] = work, task, claim

    def _lost(self, work: Work, task: Task, node: Node, lost: Lost) -> Iterator[Ended]:
        """Sets ``node`` aside. Its case is tried once more; a block is not, as it must run there."""
        lost_on = (*work.lost_on, node.name)
        if node.id not in self._executor._suspects:
            self._progress.notice(f"node {node.name} was lost ({lost.reason}).")
            self._executor._suspects[node.id] = self._executor._clock()
        homeless = self._placement.lose(node.id)
        if work.host is not None or len(lost_on) == MAX_TRIES:
            yield _ended(task, "crashed", "NodeLost", f"{_lost(lost_on)} while it ran.", host=node.name)
        else:
            self._started[work.case.id] = task
            homeless += self._placement.add([dataclasses.replace(work, lost_on=lost_on)])
        self._homeless += homeless

    def _refresh(self) -> Iterator[Ended]:
        """Takes up nodes that have joined; drops those that have gone, and the cases that no node will hold."""
        alive = {node.id: node for node in self._executor.alive()}
        known = {node.id for node in self._placement.nodes}
        busy = {claim.node.id for _, _, claim in self._running.values()}
        for node in alive.values():
            if node.id not in known | busy:
                self._placement.join(node)
        for node_id in known - alive.keys() - busy:  # a busy one is lost with its case
            self._homeless += self._placement.lose(node_id)
        waiting, self._homeless = self._homeless, []
        self._homeless = self._placement.add(waiting)
        if not self._executor._suspects:
            homeless, self._homeless = self._homeless, []
            for work in homeless:
                yield from self._without_node(work, list(alive.values()))

    def _without_node(self, work: Work, there: Sequence[Node]) -> Iterator[Ended]:
        """Ends a case that no node can hold."""
        task = self._started.pop(work.case.id, None) or self._start(work.case)
        if task is None:
            return
        if not there or work.lost_on or work.host is not None:
            names = [*work.lost_on, *([work.host] if work.host else [])]
            lost = f"{_lost(names)}, and no other can hold it." if names else "no node is left."
            yield _ended(task, "crashed", "NodeLost", lost, is_lost=work.host is not None)
        else:
            yield _ended(task, "invalid", "NoNode", no_node(work.need, there))


def _lost(names: Sequence[str]) -> str:
    different = list(dict.fromkeys(names))
    return f"node {different[0]} was lost" if len(different) == 1 else f"nodes {' and '.join(different)} were lost"


def _ended(
    task: Task, outcome: str, kind: str, message: str, *, host: str | None = None, is_lost: bool | None = None
) -> Ended:
    """The end of a task that did not run to its end. A block is lost with its node."""
    is_block = bool(((task.request or {}).get("settings") or {}).get("block"))
    return Ended(
        task=task,
        result={"outcome": outcome, "error": {"kind": kind, "message": message, "phase": None}},
        started_at=environment.now(),
        host=host,
        is_lost=is_block if is_lost is None else is_lost,
    )


def _write_files(task: Task, files: Mapping[str, bytes]) -> None:
    """Writes what a task wrote on its node to where it would have been written here."""
    for name, content in files.items():
        path = file_path(task, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def file_path(task: Task, name: str) -> Path:
    """The path of a file of a task: of a log, or of a trace below ``TRACES``."""
    top, _, rest = name.partition("/")
    if not rest or top != TRACES:
        return task.log_path.with_name(name)
    return Path(task.request["settings"]["profile_dir"]) / rest if task.request else task.log_path.with_name(rest)
