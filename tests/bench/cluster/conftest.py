"""Sweeps of fake cases, and a cluster of three nodes on this machine."""

import contextlib
import dataclasses
import io
import os
import warnings
from pathlib import Path

import psutil
import pytest

from rlhfbench.cases.sweep import Sweep
from rlhfbench.runs.progress import LineProgress
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options

CASE = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=2)
HERE = Path(__file__).parents[1]
STORE_BYTES = 80 * 2**20  # the least that Ray accepts


@pytest.fixture(scope="session")
def fake():
    """Makes a fake case of a kind."""

    def fake(kind="ok", **changes):
        return dataclasses.replace(CASE, options=Options.of({"data.prompt_field": kind}), **changes)

    return fake


@pytest.fixture(scope="session")
def sweep_of(fake):
    """Makes a sweep of one fake case of each kind."""

    def sweep_of(*kinds, **changes):
        return Sweep(cases=tuple(fake(kind, **changes) for kind in kinds))

    return sweep_of


@pytest.fixture
def told():
    """Progress that keeps what it tells."""
    return Told()


class Told(LineProgress):
    """Progress in lines, kept as text."""

    def __init__(self):
        super().__init__(io.StringIO())

    @property
    def text(self):
        """Everything that was told."""
        return self._stream.getvalue()


class Nodes:
    """A Ray cluster of a head that lends no cores, and of nodes that lend one each."""

    def __init__(self, names):
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "node_name": "head", "include_dashboard": False, "object_store_memory": STORE_BYTES}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes = {name: self.add(name) for name in names}
        self._cluster.wait_for_nodes()
        self.address = self._cluster.address

    def add(self, name, **arguments):
        """Adds a node."""
        return self._cluster.add_node(
            wait=False, num_cpus=1, node_name=name, object_store_memory=STORE_BYTES, **arguments
        )

    def wait(self):
        """Waits until all nodes are there."""
        self._cluster.wait_for_nodes()

    def name_of(self, pid):
        """The name of the node that a process belongs to."""
        pids = {process.pid for process in psutil.Process(pid).parents()}
        raylets = {name: node.all_processes["raylet"][0].process.pid for name, node in self._nodes.items()}
        return next(name for name, raylet in raylets.items() if raylet in pids)

    def kill(self, node):
        """Kills the processes of a node."""
        self._cluster.remove_node(node, allow_graceful=False)

    def kill_named(self, name):
        """Kills the node of that name."""
        self.kill(self._nodes.pop(name))

    def close(self):
        """Ends all nodes."""
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Three nodes, whose processes find the fake cases."""
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        patch.setenv("PYTHONPATH", path)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_prestart_worker_first_driver", "0")  # each test is a driver: half of the processes
        patch.setenv("FAKE_CASE_FIFO", str(tmp_path_factory.mktemp("fifo") / "fifo"))
        with warnings.catch_warnings():
            three = Nodes(["n1", "n2", "n3"])
        stack.callback(three.close)
        yield three
