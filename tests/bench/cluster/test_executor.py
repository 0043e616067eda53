"""The executor over a cluster that is simulated in this process."""

import collections
import dataclasses

import pytest

from rlhfbench.cluster import executor as module
from rlhfbench.cluster.executor import SUSPECT_S, ClusterExecutor, Lost, Reply
from rlhfbench.cluster.nodes import Need, Node
from rlhfbench.runs.execution import Task

OK = {"outcome": "ok", "error": None}


class Simulated:
    """A cluster whose tasks end as a script says, oldest first. Time passes only while it is waited for."""

    def __init__(self, *nodes, script=None):
        self.alive = list(nodes)
        self.script = script or {}  # what becomes of the tries of a case, by its seed
        self.running = collections.deque()
        self.submitted = []
        self.now_s = 0.0
        self.most_at_once = 0

    def submit(self, claim, task):
        handle = object()
        self.running.append((handle, claim, task))
        self.submitted.append((task.case.seed, claim.node.name))
        self.most_at_once = max(self.most_at_once, len(self.running))
        return handle

    def wait(self, timeout_s):
        if not self.running:
            self.now_s += timeout_s
            return []
        handle, claim, task = self.running.popleft()
        fates = self.script.get(task.case.seed) or ["ok"]
        fate = fates.pop(0)
        if fate == "node":
            self.alive.remove(claim.node)
        if fate in ("node", "agent"):
            return [(handle, Lost(reason="it died"))]
        files = {"0.log": b"a log", "traces/a/b": b"a trace"} if fate == "log" else {}
        return [(handle, Reply(fields={"result": OK, "started_at": "now", "wall_s": 1.0}, files=files))]

    def nodes(self):
        return self.alive

    def close(self):
        self.running.clear()


def node(name, num_cores=1, **others):
    return Node(id=f"id-{name}", name=name, num_cores=num_cores, **others)


@pytest.fixture
def run(tmp_path, fake, told):
    """Runs cases with these seeds on a simulated cluster; returns (seed, outcome, node) of each that ended."""

    def run(cluster, seeds, *, hosts=None, group=lambda case: case.seed, left_out=(), device="cpu"):
        executor = ClusterExecutor(
            cluster,
            need_of=lambda case: Need(device=device, num_cores=1),
            group_of=group,
            progress=told,
            clock=lambda: cluster.now_s,
        )
        started = []

        def start(case):
            started.append(case.seed)
            request = {"settings": {"block": 0 if hosts is None else 1, "profile_dir": str(tmp_path / "kept")}}
            log_path = tmp_path / f"{case.seed}.log"
            return None if case.seed in left_out else Task(case=case, request=request, log_path=log_path, timeout_s=1.0)

        cases = [fake(seed=seed) for seed in seeds]
        by_id = None if hosts is None else {case.id: hosts for case in cases}
        run.ended = list(executor.run(cases, start, by_id))
        assert sorted(started) == sorted(seeds), "every case starts once"
        return [(e.task.case.seed, e.result["outcome"], e.host) for e in run.ended]

    return run


def test_cases_run_on_all_nodes_at_once_and_each_ends_once(run):
    cluster = Simulated(node("a", 2), node("b"))
    ended = run(cluster, range(10))
    assert sorted(seed for seed, _, _ in ended) == list(range(10))
    assert cluster.most_at_once == 3
    assert {name for _, _, name in ended} == {"a", "b"}


def test_a_case_that_is_left_out_makes_room_for_the_next(run):
    cluster = Simulated(node("a"))
    assert [seed for seed, _, _ in run(cluster, range(4), left_out=(0, 2))] == [1, 3]


def test_files_are_written_where_the_run_keeps_them(run, tmp_path):
    run(Simulated(node("a"), script={0: ["log"]}), [0])
    assert (tmp_path / "0.log").read_bytes() == b"a log"
    assert (tmp_path / "kept" / "a" / "b").read_bytes() == b"a trace"


def test_a_case_of_a_lost_node_is_tried_once_more_elsewhere(run, told):
    cluster = Simulated(node("a"), node("b"), script={0: ["node"]})
    ended = run(cluster, range(3))
    assert sorted(ended) == [(0, "ok", "b"), (1, "ok", "b"), (2, "ok", "b")]
    assert cluster.submitted.count((0, "a")) == 1
    assert "node a was lost (it died)." in told.text


def test_the_second_time_it_is_crashed_and_names_the_nodes(run):
    cluster = Simulated(node("a"), node("b"), node("c"), script={0: ["node", "node"]})
    ended = run(cluster, range(4))
    assert {outcome for seed, outcome, _ in ended if seed} == {"ok"}
    (crashed,) = [e for e in run.ended if e.task.case.seed == 0]
    assert crashed.result["outcome"] == "crashed"
    assert crashed.result["error"]["message"] == "nodes a and c were lost while it ran."
    assert not crashed.is_lost


def test_a_node_whose_process_died_is_used_again_later(run):
    cluster = Simulated(node("a"), script={0: ["agent"]})
    assert sorted(run(cluster, range(2))) == [(0, "ok", "a"), (1, "ok", "a")]
    assert cluster.now_s > SUSPECT_S


def test_when_the_last_node_is_lost_every_case_has_an_outcome(run):
    ended = run(Simulated(node("a"), script={0: ["node"]}), range(3))
    assert [(seed, outcome) for seed, outcome, _ in sorted(ended)] == [(0, "crashed"), (1, "crashed"), (2, "crashed")]
    messages = {e.result["error"]["message"] for e in run.ended}
    assert messages == {"node a was lost, and no other can hold it.", "no node is left."}


def test_a_block_of_a_lost_node_is_lost_with_it(run):
    cluster = Simulated(node("a"), node("b"), script={0: ["node"]})
    run(cluster, range(2), hosts="a")
    assert [(e.is_lost, e.result["outcome"]) for e in run.ended] == [(True, "crashed")] * 2
    assert cluster.submitted == [(0, "a")]


def test_a_case_that_no_node_can_hold_is_invalid(run):
    assert run(Simulated(node("a")), [0], device="cuda") == [(0, "invalid", None)]
    error = run.ended[0].result["error"]
    assert error["kind"] == "NoNode"
    assert error["message"] == "no node can hold it: it needs 1 CUDA device, 1 core, and node a has 1 core, no GPU."


def test_nodes_that_join_are_used_and_nodes_that_leave_are_not(run, monkeypatch):
    monkeypatch.setattr(module, "REFRESH_S", 0.0)
    cluster = Simulated(node("a"), node("b"))
    wait = cluster.wait

    def changing(timeout_s):
        if len(cluster.submitted) == 4:
            cluster.alive = [cluster.alive[0], node("c")]
        return wait(timeout_s)

    cluster.wait = changing
    ended = run(cluster, range(12))
    assert sorted(seed for seed, _, _ in ended) == list(range(12))
    names = [name for _, name in cluster.submitted]
    assert set(names[:4]) == {"a", "b"}
    assert set(names[5:]) == {"a", "c"}


def test_ended_has_the_fields_that_a_reply_names():
    reply = {"result", "started_at", "wall_s", "max_rss_bytes", "driver_peak_bytes", "plan", "plan_timeline"}
    names = {field.name for field in dataclasses.fields(module.Ended)}
    assert reply == names - {"task", "host", "is_lost"}
