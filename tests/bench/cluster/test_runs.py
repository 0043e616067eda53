"""Runs on a simulated cluster: what the runner makes of nodes that are lost."""

import collections

import pytest

from rlhfbench.cluster.executor import ClusterExecutor, Lost, Reply
from rlhfbench.cluster.nodes import Need, Node
from rlhfbench.records.file import read_records
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.runner import run_sweep


class Blocks:
    """A cluster of one node whose tasks are blocks of one phase. It is lost with the task of that number."""

    def __init__(self, lost_at=None, torch=None):
        self.lost_at, self.torch, self.num_tasks = lost_at, torch, 0
        self.alive = [Node(id="a", name="a", num_cores=1)]
        self.running = collections.deque()
        self.now_s = 0.0

    def submit(self, claim, task):
        self.running.append((object(), task))
        return self.running[-1][0]

    def wait(self, timeout_s):
        self.now_s += timeout_s
        if not self.running:
            return []
        handle, task = self.running.popleft()
        self.num_tasks += 1
        if self.num_tasks == self.lost_at:
            self.alive = []
            return [(handle, Lost(reason="it died"))]
        number = task.request["settings"]["block"]
        block = {"phases": {"generate": [number + 1.0]}, "stopped_because": "budget", "error": None}
        latency = {"phases": {"generate": {"kind": "inference"}}, "num_blocks": 3}
        once = {"memory": {"total_bytes": 6}, "latency": latency} if number == 0 else {}
        result = {"outcome": "ok", "error": None, **once, "block": block}
        return [(handle, Reply(fields={"result": result, "started_at": "now", "wall_s": 1.0}, files={}))]

    def nodes(self):
        return self.alive

    def close(self):
        self.running.clear()


class Place:
    """A place that is a simulated cluster."""

    settings = {"ray": "simulated"}  # noqa: RUF012

    def __init__(self, cluster):
        self.cluster = cluster

    def make_executor(self, setup):
        self.setup = setup
        if self.cluster.torch is not None:
            setup.add_nodes({"a": {"host": "a", "versions": {"torch": self.cluster.torch}}})
        return ClusterExecutor(
            self.cluster,
            need_of=lambda case: Need(device="cpu"),
            group_of=lambda case: "",
            progress=setup.progress,
            clock=lambda: self.cluster.now_s,
        )


@pytest.fixture
def run(tmp_path, fake, told, sweep_of):
    """Runs two cases of three blocks on a simulated cluster; returns the blocks that each has then."""

    def run(cluster, **how):
        run.place = Place(cluster)
        sweep = sweep_of("a", "b")
        run_sweep(sweep, tmp_path / "run", RunOptions(), progress=told, place=run.place, **how)
        return [len(record["latency"]["blocks"] or ()) for record in read_records(tmp_path / "run")]

    return run


def test_blocks_that_were_lost_with_their_node_are_timed_when_it_is_back(run, tmp_path, told):
    assert sorted(run(Blocks(lost_at=4))) == [1, 2]
    assert "node a was lost (it died)." in told.text
    cluster = Blocks()
    assert run(cluster, resume=True) == [3, 3]
    assert cluster.num_tasks == 3
    records = read_records(tmp_path / "run")
    assert [[block["phases"]["generate"] for block in r["latency"]["blocks"]] for r in records] == [
        [[1.0], [2.0], [3.0]]
    ] * 2
    assert {record["run"]["host"] for record in records} == {"a"}


@pytest.mark.parametrize(("torch", "expected"), [("2.11", [3, 3]), ("2.12", [1, 2])])
def test_blocks_are_added_under_the_conditions_of_the_node_not_of_the_driver(run, monkeypatch, torch, expected):
    run(Blocks(lost_at=4, torch="2.11"))
    monkeypatch.setattr("platform.node", lambda: "another driver")
    assert sorted(run(Blocks(torch=torch), resume=True)) == expected


def test_a_resumed_run_tells_its_cluster_where_its_cases_ran(run):
    run(Blocks())
    assert run.place.setup.hosts == {}
    run(Blocks(), resume=True)
    assert set(run.place.setup.hosts.values()) == {"a"}
    assert len(run.place.setup.hosts) == 2
