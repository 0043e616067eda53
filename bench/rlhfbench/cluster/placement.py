"""Placement of cases: by need, one case on a device and on a set of cores, and a group of cases on one machine.

Pure bookkeeping, without Ray. A choice costs no more for 10,000 cases than for ten: nodes that may take a case stand in
one queue, and the cases of a group in another.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence

from rlhfbench.cluster.nodes import Need, Node
from rlhfkernels.config.case import Case


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A case that waits for a node.

    Attributes:
        case: the case.
        need: what it needs.
        group: cases of one group run on one machine where one can hold them all.
        host: the only machine that may run it; ``None`` for any.
        lost_on: names of the machines that died with it.
    """

    case: Case
    need: Need
    group: Hashable = ""
    host: str | None = None
    lost_on: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """The share of a node that a running case holds.

    Attributes:
        node: the node.
        cores: places of its cores among those that the node lends.
        num_gpus: CUDA devices.
        memory_bytes: memory of the machine.
    """

    node: Node
    cores: tuple[int, ...]
    num_gpus: int
    memory_bytes: int

    @property
    def takes_all_cores(self) -> bool:
        """True if no core of the node is left for another case."""
        return len(self.cores) == self.node.num_cores


class _Free:
    """The free devices and memory of a node, and the cases that are bound to it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.cores = set(range(node.num_cores))
        self.num_gpus = node.num_gpus
        self.memory_bytes = node.memory_bytes
        self.queues: dict[_Queue, None] = {}

    def claim(self, need: Need) -> Claim | None:
        """Takes what ``need`` asks for; ``None`` if not all of it is free."""
        num_cores, num_gpus = self.node.cores_for(need), need.num_ranks if need.device == "cuda" else 0
        memory_bytes = (need.memory_bytes or 0) if need.device == "cpu" else 0
        too_large = self.memory_bytes is not None and memory_bytes > self.memory_bytes
        if num_cores > len(self.cores) or num_gpus > self.num_gpus or too_large:
            return None
        claim = Claim(
            node=self.node,
            cores=tuple(sorted(self.cores)[:num_cores]),
            num_gpus=num_gpus,
            memory_bytes=memory_bytes,
        )
        self._change(claim, -1)
        self.cores -= set(claim.cores)
        return claim

    def release(self, claim: Claim) -> None:
        """Returns what ``claim`` held."""
        self._change(claim, 1)
        self.cores |= set(claim.cores)

    def _change(self, claim: Claim, sign: int) -> None:
        self.num_gpus += sign * claim.num_gpus
        if self.memory_bytes is not None:
            self.memory_bytes += sign * claim.memory_bytes


class _Queue:
    """Cases that wait together, of which one machine runs all that are not lost with another."""

    def __init__(self, works: Sequence[Work]) -> None:
        self.works = collections.deque(works)
        self.needs = frozenset(work.need for work in works)
        first = works[0]  # the rest is the same for all
        self.group, self.host, self.lost_on = first.group, first.host, first.lost_on

    def fits(self, node: Node) -> bool:
        """True if ``node`` may run and can hold every case."""
        return self.host in (None, node.name) and all(map(node.holds, self.needs))


class Placement:
    """Hands out cases to nodes.

    Args:
        nodes: the nodes at first.
        homes: names of the machines on which cases of a group ran last. A group goes on there if it can.
    """

    def __init__(self, nodes: Iterable[Node], homes: Mapping[Hashable, str] | None = None) -> None:
        self._homes = dict(homes or {})
        self._nodes: dict[str, _Free] = {}
        self._unbound: dict[_Queue, None] = {}
        self._ready: dict[str, None] = {}  # ids of nodes that may have room for a case
        # The largest first: a sweep that stays together goes to the machine that runs most of its cases at once.
        for node in sorted(nodes, key=lambda node: (-node.num_gpus, -node.num_cores, node.name)):
            self.join(node)

    @property
    def nodes(self) -> list[Node]:
        """The nodes that are there."""
        return [free.node for free in self._nodes.values()]

    def join(self, node: Node) -> None:
        """Adds a node."""
        self._nodes[node.id] = _Free(node)
        self._ready[node.id] = None

    def lose(self, node_id: str) -> list[Work]:
        """Removes a node, and returns the cases that no other can hold."""
        free = self._nodes.pop(node_id, None)
        if free is None:
            return []
        self._ready.pop(node_id, None)
        left = [queue for queue in self._unbound if not any(queue.fits(other) for other in self.nodes)]
        for queue in left:
            del self._unbound[queue]
        return self.add(work for queue in [*free.queues, *left] for work in queue.works)

    def add(self, works: Iterable[Work]) -> list[Work]:
        """Adds cases behind those that wait, and returns the cases that no node can hold.

        Where no node can hold all cases of a group, the group is divided.
        """
        groups: dict[Hashable, list[Work]] = {}
        for work in works:
            groups.setdefault((work.group, work.host, work.lost_on), []).append(work)
        homeless: list[Work] = []
        for members in groups.values():
            rest = members
            while rest:
                able = self._largest_part({work.need for work in rest}, rest[0].host)
                if not able:
                    homeless += rest
                    break
                self._queue(_Queue([work for work in rest if work.need in able]))
                rest = [work for work in rest if work.need not in able]
        return homeless

    def _largest_part(self, needs: set[Need], host: str | None) -> set[Need]:
        """The most of ``needs`` that one node can hold."""
        best: set[Need] = set()
        for node in self.nodes:
            if host in (None, node.name):
                able = set(filter(node.holds, needs))
                best = able if len(able) > len(best) else best
                if len(best) == len(needs):
                    break
        return best

    def _queue(self, queue: _Queue) -> None:
        home = self._home(queue)
        if home is not None:
            self._bind(queue, home)
            return
        self._unbound[queue] = None
        self._ready = dict.fromkeys(self._nodes)

    def _home(self, queue: _Queue) -> _Free | None:
        """The node on which cases of the group ran last, if these can run there."""
        name = queue.host or self._homes.get(queue.group)
        if name is None or name in queue.lost_on:
            return None
        return next((free for free in self._nodes.values() if free.node.name == name and queue.fits(free.node)), None)

    def _bind(self, queue: _Queue, free: _Free) -> None:
        self._unbound.pop(queue, None)
        self._homes[queue.group] = free.node.name
        free.queues[queue] = None
        self._ready[free.node.id] = None

    def next(self) -> tuple[Work, Claim] | None:
        """A case and what it holds of its node, or ``None`` if none can start now."""
        while self._ready:
            node_id = next(iter(self._ready))
            found = self._next_on(self._nodes[node_id])
            del self._ready[node_id]
            if found is not None:
                self._ready[node_id] = None  # at the end: the other nodes take their next case first
                return found
        return None

    def _next_on(self, free: _Free) -> tuple[Work, Claim] | None:
        for queue in list(free.queues):
            claim = free.claim(queue.works[0].need)
            if claim is not None:
                return self._take(queue, free), claim
        if not free.cores:
            return None
        for queue in self._unbound:
            if (self._home(queue) or free) is free and queue.fits(free.node) and not self._can_avoid(queue, free.node):
                claim = free.claim(queue.works[0].need)
                if claim is not None:
                    self._bind(queue, free)
                    return self._take(queue, free), claim
        return None

    def _can_avoid(self, queue: _Queue, node: Node) -> bool:
        """True if ``node`` was lost with these cases, and another can hold them."""
        return node.name in queue.lost_on and any(
            other.name not in queue.lost_on and queue.fits(other) for other in self.nodes
        )

    def _take(self, queue: _Queue, free: _Free) -> Work:
        work = queue.works.popleft()
        if not queue.works:
            del free.queues[queue]
        return work

    def release(self, claim: Claim) -> None:
        """Returns what a case held that has ended."""
        free = self._nodes.get(claim.node.id)
        if free is not None:
            free.release(claim)
            self._ready[claim.node.id] = None
