"""The devices and memory of a node, and those that a case needs."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence

from rlhfbench.cases.ranks import MAX_RANKS_PER_CORE

GIB = 2**30
_MAX_NODES_NAMED = 3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """The needs of a case: devices and memory of a node.

    Attributes:
        device: ``cpu`` or ``cuda``.
        num_ranks: processes of the case: each has a CUDA device of its own, or shares the cores with the others.
        num_cores: cores; ``None`` for all of the node, or for a CUDA device's share of them.
        memory_bytes: planned memory, of the machine for a CPU and of each device for CUDA; ``None`` if it is not known.
    """

    device: str
    num_ranks: int = 1
    num_cores: int | None = None
    memory_bytes: int | None = None

    @property
    def min_cores(self) -> int:
        """The number of cores without which no node can hold the case."""
        if self.num_cores is not None:
            return self.num_cores
        return 1 if self.device != "cpu" else -(-self.num_ranks // MAX_RANKS_PER_CORE)

    def __str__(self) -> str:
        """In words: ``2 CUDA devices of 24 GiB, 4 cores``."""
        memory = [] if self.memory_bytes is None else [f"{self.memory_bytes / GIB:.3g} GiB"]
        cores = [] if self.num_cores is None else [_count(self.num_cores, "core")]
        if self.device == "cpu":
            if self.num_ranks > 1:
                cores = [f"{_count(self.min_cores, 'core')} for {self.num_ranks} ranks"]
            return ", ".join([*cores, *memory]) or "1 core"
        return ", ".join([" of ".join([_count(self.num_ranks, "CUDA device"), *memory]), *cores])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A machine of the cluster.

    Attributes:
        id: Ray's id of the node.
        name: its name in records.
        num_cores: cores that Ray lends.
        num_gpus: CUDA devices that Ray lends.
        memory_bytes: memory that Ray lends; ``None`` if it does not say.
        gpu_bytes: memory of the smallest CUDA device that a case may use; ``None`` if it is not known.
    """

    id: str
    name: str
    num_cores: int
    num_gpus: int = 0
    memory_bytes: int | None = None
    gpu_bytes: int | None = None

    def __str__(self) -> str:
        """In words: ``4 cores, 15.2 GiB, no GPU``."""
        gpus = _count(self.num_gpus, "GPU") if self.num_gpus else "no GPU"
        if self.num_gpus and self.gpu_bytes is not None:
            gpus += f" of {self.gpu_bytes / GIB:.3g} GiB"
        memory = "" if self.memory_bytes is None else f", {self.memory_bytes / GIB:.3g} GiB"
        return f"{_count(self.num_cores, 'core')}{memory}, {gpus}"

    def cores_for(self, need: Need) -> int:
        """The number of cores that a case takes here: no other case has them while it runs."""
        if need.num_cores is not None:
            return need.num_cores
        if need.device == "cpu":
            return self.num_cores
        return max(1, self.num_cores * need.num_ranks // max(self.num_gpus, 1))

    def holds(self, need: Need) -> bool:
        """True if a case of this need can run here while nothing else does."""
        if not need.min_cores <= self.cores_for(need) <= self.num_cores:
            return False
        if need.device == "cpu":
            return _fits(need.memory_bytes, self.memory_bytes)
        return need.num_ranks <= self.num_gpus and _fits(need.memory_bytes, self.gpu_bytes)


def no_node(need: Need, nodes: Sequence[Node]) -> str:
    """One sentence on a case that no node can hold: what it needs, and what there is."""
    alike: dict[Node, list[Node]] = collections.defaultdict(list)
    for node in nodes:
        alike[dataclasses.replace(node, id="", name="", memory_bytes=None)].append(node)
    # Nodes of one kind lend somewhat different amounts of memory; the largest decides.
    there = [f"{_names(kind)} {max(kind, key=lambda node: node.memory_bytes or 0)}" for kind in alike.values()]
    more = f"; and {len(there) - _MAX_NODES_NAMED} other kinds" if len(there) > _MAX_NODES_NAMED else ""
    return f"no node can hold it: it needs {need}, and {'; '.join(there[:_MAX_NODES_NAMED])}{more}."


def names_of(hosts: Iterable[tuple[str, str, str]]) -> dict[str, str]:
    """The names of nodes in records, by id: the host's name, with more where several nodes share it.

    Args:
        hosts: id, name of the host and Ray's name of each node.
    """
    known = list(hosts)
    found: dict[str, str] = {}
    for names in (
        {node_id: host for node_id, host, _ in known},
        {node_id: f"{host}/{name}" for node_id, host, name in known},
        {node_id: f"{host}/{node_id[:8]}" for node_id, host, _ in known},
    ):
        counts = collections.Counter(names.values())
        found = {node_id: name for node_id, name in names.items() if counts[name] == 1} | found
    return found


def _fits(needed: int | None, there: int | None) -> bool:
    return needed is None or there is None or needed <= there


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _names(nodes: Sequence[Node]) -> str:
    return f"node {nodes[0].name} has" if len(nodes) == 1 else f"{len(nodes)} nodes have up to"
