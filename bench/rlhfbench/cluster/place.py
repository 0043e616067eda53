"""A Ray cluster as the place where the cases of a run are executed."""

from __future__ import annotations

import collections
import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Self

from rlhfbench.cluster.address import LOCAL, check_address
from rlhfbench.cluster.executor import ClusterExecutor
from rlhfbench.cluster.needs import GROUPS, needs_of
from rlhfbench.errors import SweepError
from rlhfbench.launch import find_launch
from rlhfbench.runs import versions
from rlhfbench.runs.execution import Executor, Setup
from rlhfkernels.config.case import Case
from rlhfkernels.naming import unknown

_MAX_STORE_BYTES = 2**28  # of a local cluster: results are small, and Ray would take 30 % of the memory


class Cluster:
    """A connection to a Ray cluster, or a cluster of this machine alone, as long as the context lasts.

    Args:
        address: ``local``, or ``HOST:PORT`` of the head.
        group: which cases run on one machine: ``sweep``, ``model``, ``size`` or ``case``.

    Raises:
        SweepError: an argument is wrong, ray is missing, a launcher started several processes, no cluster answers, or
            a node has another version.
    """

    server_arguments: ClassVar[Mapping[str, Any]] = {}  # of the fork servers on the nodes

    def __init__(self, address: str, group: str = "sweep") -> None:
        if group not in GROUPS:
            raise SweepError([unknown("--ray-group", group, GROUPS)])
        if importlib.util.find_spec("ray") is None:
            raise SweepError(
                [f"--ray is '{address}': it needs ray, which is not installed (pip install 'rlhfbench[ray]')."]
            )
        launch = find_launch()
        if launch is not None:
            raise SweepError(
                [f"--ray is '{address}': a launcher started {launch.size} processes, and Ray is used by one alone."]
            )
        check_address(address)
        self._address, self._group = address, group

    @property
    def settings(self) -> Mapping[str, Any]:
        """The entry of the run's environment."""
        return {"ray": self._address, "ray_group": self._group}

    def check(self, cases: Sequence[Case]) -> None:
        """Checks that no case names one of several devices, before the cluster is connected to.

        Raises:
            SweepError: some do.
        """
        devices = dict.fromkeys(case.device for case in cases if ":" in case.device)
        if devices:
            raise SweepError(
                f"device '{device}': on a cluster a case takes any free device: name '{device.partition(':')[0]}'."
                for device in devices
            )

    def __enter__(self) -> Self:
        _connect(self._address)
        try:
            _check_nodes(self._address)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()

    def make_executor(self, setup: Setup) -> Executor:
        """An executor of the run; the caller closes it."""
        # Imported here: it imports ray, which takes most of a second and may be missing.
        from rlhfbench.cluster.ray_transport import RayTransport

        tell = setup.progress.notice
        modules = [f"transformers.models.{name}.modeling_{name}" for name in setup.model_types]
        group_of = GROUPS[self._group]
        homes: dict[Hashable, collections.Counter[str]] = {}
        for case in setup.cases:
            host = setup.hosts.get(case.id)
            if host is not None:
                homes.setdefault(group_of(case), collections.Counter())[host] += 1
        need_of = needs_of(setup.cases, setup.options, setup.folder, tell)
        return ClusterExecutor(
            RayTransport(
                server={"optional": modules, **self.server_arguments},
                describe=setup.environment,
                add_nodes=setup.add_nodes,
                tell=tell,
            ),
            need_of=need_of,
            group_of=group_of,
            homes={group: counts.most_common(1)[0][0] for group, counts in homes.items()},
            progress=setup.progress,
        )


def _connect(address: str) -> None:
    """Connects to the cluster, or starts that of this machine.

    Raises:
        SweepError: no cluster answers.
    """
    is_local = address == LOCAL
    # Read when ray is imported and when it starts its processes. Cases that need too much memory are ended by the
    # kernel, as without Ray, and not by Ray with the process that watches them.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if is_local:
        os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    import ray

    how: dict[str, Any] = {}
    if is_local:
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        how = {"num_cpus": num_cores, "object_store_memory": _MAX_STORE_BYTES, "include_dashboard": False}
    before = signal.getsignal(signal.SIGTERM)
    # Ray prints what its processes log, to standard output; what matters of it is in records and notices.
    ray._private.worker._worker_logs_enabled = False
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **how)
    except Exception as error:  # Ray raises errors of many kinds here
        ray.shutdown()
        reason = " ".join(str(error).split())[:300]
        raise SweepError([f"--ray is '{address}': Ray cannot connect there: {reason}"]) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray sets its own, which ends the process at once


def _check_nodes(address: str) -> None:
    """Checks that there are nodes and that all of them have this version, before anything else runs there.

    Raises:
        SweepError: every problem, one sentence each.
    """
    from rlhfbench.cluster.ray_transport import ask_nodes, raw_nodes

    names = {node["NodeID"]: node["name"] for node in raw_nodes()}
    if not names:
        raise SweepError([f"--ray is '{address}': no node of that cluster lends cores."])
    found, failed = ask_nodes(versions.installed, names)
    problems = versions.version_problems(versions.installed(), found)
    problems += [f"node {name} cannot be asked for its version: {why}." for name, why in failed.items()]
    if problems:
        raise SweepError(problems)
