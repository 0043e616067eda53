"""The transport of Ray: an actor for each claim on a node, and the nodes as Ray sees them."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhfbench.cluster.agent import Agent, describe_node, message_of
from rlhfbench.cluster.executor import SUSPECT_S, Lost, Reply
from rlhfbench.cluster.lease import keep_lease
from rlhfbench.cluster.nodes import Node, names_of
from rlhfbench.cluster.placement import Claim
from rlhfbench.planning.devices import Accelerator
from rlhfbench.runs import environment, versions
from rlhfbench.runs.execution import Task

NODES_S = 1.0  # a list of the nodes is used for so long
_POLL_S = 0.2
PROBE_S = 60.0  # a node that starts its first worker in this time can run cases

ray.cloudpickle.register_pickle_by_value(versions)  # type: ignore[no-untyped-call]


def raw_nodes() -> list[dict[str, Any]]:
    """The living nodes that lend cores, as Ray describes them, with their ``name`` in records."""
    known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    names = names_of((node["NodeID"], node["NodeManagerHostname"], node["NodeName"]) for node in known)
    lending = [node for node in known if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    return [{**node, "name": names[node["NodeID"]]} for node in lending]


def on_node(function: Callable[..., Any], node_id: str) -> Any:
    """``function`` as a remote function that runs on that node beside whatever else runs there."""
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(function).options(num_cpus=0, scheduling_strategy=strategy, max_retries=0)


def ask_nodes(
    function: Callable[..., Any], nodes: Mapping[str, str], *arguments: Any
) -> tuple[dict[str, Any], dict[str, str]]:
    """Calls ``function`` on nodes.

    Args:
        function: the function.
        nodes: names of the nodes by their ids.
        arguments: of the function.

    Returns:
        What each node returned, and why the others did not, by name.
    """
    refs = {on_node(function, node_id).remote(*arguments): name for node_id, name in nodes.items()}
    ray.wait(list(refs), num_returns=len(refs), timeout=PROBE_S)
    found, failed = {}, {}
    for ref, name in refs.items():
        try:
            found[name] = ray.get(ref, timeout=0)
        except RayTaskError as error:
            failed[name] = _last_line(error)
        except GetTimeoutError:
            failed[name] = f"it started no worker within {PROBE_S:g} s"
        except RayError as error:
            failed[name] = f"Ray says {type(error).__name__}"
    return found, _of_living(failed)


def _of_living(failed: Mapping[str, str]) -> dict[str, str]:
    """``failed`` without nodes that Ray finds dead within the next seconds."""
    deadline_s = time.monotonic() + SUSPECT_S
    while failed and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        names = {node["name"] for node in raw_nodes()}
        failed = {name: why for name, why in failed.items() if name in names}
    return dict(failed)


class NodeAgent(Agent):
    """An agent that ends itself where its node is cut off: Ray would leave it alone, and its case is tried elsewhere.

    Args:
        server: see ``Agent``.
        cores: see ``Agent``.
    """

    def __init__(self, server: Mapping[str, Any], cores: Sequence[int] | None) -> None:
        keep_lease(ray.get_runtime_context().gcs_address)
        super().__init__(server, cores)


class RayTransport:
    """Carries tasks to the nodes of the cluster that this process is connected to.

    Args:
        server: arguments of ``ForkServer`` on the nodes.
        describe: arguments of ``rlhfbench.runs.environment.describe``.
        add_nodes: receives the environments of nodes by name, before the first case runs there.
        tell: receives notices.
    """

    def __init__(
        self,
        *,
        server: Mapping[str, Any],
        describe: Mapping[str, Any],
        add_nodes: Callable[[Mapping[str, Mapping[str, Any]]], None],
        tell: Callable[[str], None],
    ) -> None:
        self._server, self._describe, self._add_nodes, self._tell = dict(server), dict(describe), add_nodes, tell
        self._agent_class = ray.remote(NodeAgent)
        self._idle: dict[str, dict[Hashable, list[Any]]] = {}  # agents by node and claim
        self._running: dict[ray.ObjectRef[Any], tuple[Claim, Any]] = {}
        self._known: dict[str, Node | None] = {}  # None: the node cannot run cases
        self._here = versions.installed()
        self._nodes: list[Node] = []
        self._listed_s: float | None = None

    def nodes(self) -> Sequence[Node]:
        """The nodes that are there now and may run cases."""
        if self._listed_s is None or time.monotonic() - self._listed_s > NODES_S:
            alive = raw_nodes()
            fresh = [node for node in alive if node["NodeID"] not in self._known]
            if fresh:
                self._learn(fresh)
            nodes = (self._known[node["NodeID"]] for node in alive)
            self._nodes = [node for node in nodes if node is not None]
            self._listed_s = time.monotonic()
        return self._nodes

    def _learn(self, fresh: Sequence[Mapping[str, Any]]) -> None:
        """Checks the versions of nodes, and records their environments."""
        names = {node["NodeID"]: node["name"] for node in fresh}
        installed, failed = ask_nodes(versions.installed, names)
        problems = versions.version_problems(self._here, installed)
        wrong = {name for name, found in installed.items() if found != self._here}
        same = {node_id: name for node_id, name in names.items() if name in installed and name not in wrong}
        environments, unable = ask_nodes(describe_node, same, self._describe)
        for sentence in [*problems, *(f"node {name}: {why}." for name, why in {**failed, **unable}.items())]:
            self._tell(f"{sentence} It runs no case.")
        if environments:
            self._add_nodes(environments)
        for node in fresh:
            found = environments.get(node["name"])
            self._known[node["NodeID"]] = None if found is None else node_of(node, found)

    def submit(self, claim: Claim, task: Task) -> Hashable:
        """Sends a task to a node and returns a handle."""
        agent = self._agent(claim)
        ref: ray.ObjectRef[Any] = agent.run.remote(message_of(task))
        self._running[ref] = claim, agent
        return ref

    def _agent(self, claim: Claim) -> Any:
        """An agent that holds what ``claim`` does: an idle one, or a new one in the place of the idle ones."""
        idle = self._idle.setdefault(claim.node.id, {})
        if idle.get(_key(claim)):
            return idle[_key(claim)].pop()
        for agent in [agent for agents in idle.values() for agent in agents]:
            ray.kill(agent)
        idle.clear()
        return self._new_agent(claim)

    def _new_agent(self, claim: Claim) -> Any:
        return self._agent_class.options(
            num_cpus=len(claim.cores),
            num_gpus=claim.num_gpus,
            scheduling_strategy=NodeAffinitySchedulingStrategy(claim.node.id, soft=False),
        ).remote(self._server, None if claim.takes_all_cores else claim.cores)

    def wait(self, timeout_s: float) -> Sequence[tuple[Hashable, Reply | Lost]]:
        """Waits until tasks have ended, for some time at most, and returns them by their handles."""
        if not self._running:
            time.sleep(timeout_s)
            return []
        refs = list(self._running)
        if not ray.wait(refs, timeout=timeout_s)[0]:
            return []
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        return [(ref, self._answer(ref)) for ref in ready]

    def _answer(self, ref: ray.ObjectRef[Any]) -> Reply | Lost:
        claim, agent = self._running.pop(ref)
        try:
            fields, files = ray.get(ref)
        except RayTaskError as error:
            answer: Reply | Lost = _failure("crashed", type(error.cause).__name__, _last_line(error))
        except OutOfMemoryError:  # the agent is dead, and Ray would answer its next task with the same error
            return _failure("oom", "OutOfMemoryError", f"Ray ended it: node {claim.node.name} was out of memory.")
        except RayError as error:
            with suppress(RayError):
                ray.kill(agent)
            self._listed_s = None
            return Lost(reason=type(error).__name__)
        else:
            answer = Reply(fields=fields, files=files)
        self._idle.setdefault(claim.node.id, {}).setdefault(_key(claim), []).append(agent)
        return answer

    def close(self) -> None:
        """Ends every task, and the process of each agent with it."""
        idle = [agent for agents in self._idle.values() for of_claim in agents.values() for agent in of_claim]
        for agent in [*idle, *(agent for _, agent in self._running.values())]:
            with suppress(RayError):
                ray.kill(agent)
        self._idle.clear()
        self._running.clear()


def node_of(node: Mapping[str, Any], found: Mapping[str, Any]) -> Node:
    """The devices and memory of a node, by Ray's description of it and by its environment."""
    resources = node["Resources"]
    memory = [gpu["memory_bytes"] for gpu in found.get("gpus") or ()]
    usable = [Accelerator(name="", memory_bytes=total).usable_bytes for total in memory]
    return Node(
        id=node["NodeID"],
        name=node["name"],
        num_cores=int(resources.get("CPU", 0)),
        num_gpus=int(resources.get("GPU", 0)),
        memory_bytes=int(resources["memory"]) if "memory" in resources else None,
        gpu_bytes=min(usable, default=None),
    )


def _key(claim: Claim) -> Hashable:
    return claim.cores, claim.num_gpus


def _failure(outcome: str, kind: str, message: str) -> Reply:
    error = {"kind": kind, "message": message, "phase": None}
    return Reply(fields={"result": {"outcome": outcome, "error": error}, "started_at": environment.now()}, files={})


def _last_line(error: RayTaskError) -> str:
    return f"{type(error.cause).__name__}: {error.cause}".splitlines()[0]
