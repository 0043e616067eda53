"""Ranks over the processes of a launcher: two "machines" on the loopback, each with a fork server of its own."""

import threading

import pytest

from rlhfbench.errors import SweepError
from rlhfbench.launch import Launch
from rlhfbench.network import free_port
from rlhfbench.runs import hangs, leader, rendezvous
from rlhfbench.runs.follower import Follower
from rlhfbench.runs.leader import LaunchedRanks, Leader, Peer
from rlhfbench.runs.rendezvous import SharedStore


def launch(rank, port, job=""):
    return Launch(rank=rank, size=2, local_rank=0, local_size=1, host="127.0.0.1", port=port, job=job)


@pytest.fixture(scope="module")
def run(make_rank_server, rank_server, tmp_path_factory):
    """Runs a case over two machines: the leader in this thread, the other process's loop in another."""
    port = free_port()
    first = Leader(launch(0, port))
    other = threading.Thread(target=lambda: Follower(launch(1, port)).follow(make_rank_server()))
    other.start()
    first.start()
    folder = tmp_path_factory.mktemp("agents")

    def run(request, timeout_s=60.0):
        messages = []
        how = {"log_path": folder / "log", "timeout_s": timeout_s, "on_message": messages.append}
        end = first.run(rank_server, request, 2, **how)
        (result,) = [message["result"] for message in messages if "result" in message]
        return result, end

    yield run
    first.end()
    other.join(30)
    assert not other.is_alive()


def test_a_case_runs_over_two_machines(run, rank_request):
    result, end = run(rank_request("well"))
    assert (result["outcome"], result["error"], end.code) == ("ok", None, 0)
    world = result["world"]
    assert world["size"] == len(world["ranks"]) == 2
    assert world["worst_rank"] == 1
    assert world["collectives"]["update"] == {"all_reduce": {"calls": 1, "bytes": 4000}}


@pytest.mark.parametrize(
    ("kind", "outcome", "message"),
    [
        ("die", "crashed", "rank 1 was killed by SIGKILL in phase update; the other rank waited in all_reduce."),
        ("out-of-memory", "oom", "rank 1 failed in phase update: no room for it; the other rank waited in all_reduce."),
        ("hang", "timeout", "rank 1 hung in phase update; the other rank waited in all_reduce."),
        (
            "spin",
            "timeout",
            "rank 1 kept the CPU busy without progress in phase update; the other rank waited in all_reduce.",
        ),
    ],
)
def test_a_rank_of_the_other_machine_that_fails_is_named(run, rank_request, monkeypatch, kind, outcome, message):
    with monkeypatch.context() as patch:
        patch.setattr(hangs, "STALL_S", 3.0)
        result, _ = run(rank_request(kind))
    assert (result["outcome"], result["error"]["message"]) == (outcome, message)
    assert run(rank_request("well"))[0]["outcome"] == "ok"


def test_a_fork_server_that_is_killed_names_its_rank_and_the_next_case_has_another(run, rank_request):
    result, _ = run(rank_request("kill-server"))
    assert (result["outcome"], result["error"]["kind"]) == ("crashed", "ServerDied")
    assert result["error"]["message"] == (
        f"rank 1 died with the fork server (last seen in phase {result['error']['phase']}); "
        "the other rank waited in all_reduce."
    )
    assert run(rank_request("well"))[0]["outcome"] == "ok"


def test_the_ranks_of_each_machine_are_told_in_their_order(monkeypatch):
    first = Leader(launch(0, free_port()))
    monkeypatch.setattr(leader.platform, "node", lambda: "a")
    first._peers = {1: Peer("a"), 2: Peer("b"), 3: Peer("b")}
    assert first.layout == "2 here, 2 on b"
    first._peers = {1: Peer("b"), 2: Peer("a"), 3: Peer("b")}
    assert first.layout == "1 here, 1 on b, 1 here, 1 on b"


def test_a_port_in_use_is_one_sentence():
    port = free_port()
    first = SharedStore(launch(0, port))
    with pytest.raises(SweepError, match=f"^MASTER_PORT is {port}: it is in use on this machine.$"):
        SharedStore(launch(0, port))
    del first


def test_a_process_takes_no_case_of_another_job_at_the_same_port(monkeypatch):
    port = free_port()
    first = Leader(launch(0, port, job="17.0"))
    monkeypatch.setattr(rendezvous, "JOIN_S", 0.2)
    with pytest.raises(
        SweepError, match=rf"^the launcher's address is 127\.0\.0\.1:{port}: this job's process of rank"
    ):
        Follower(launch(1, port, job="18.0"))
    Follower(launch(1, port, job="17.0"))
    assert first.start() is None


def test_a_leader_that_does_not_answer_is_one_sentence(monkeypatch):
    monkeypatch.setattr(rendezvous, "JOIN_S", 0.2)
    with pytest.raises(SweepError, match=r"^the launcher's address is 127.0.0.1:\d+: no process of rank 0 answers"):
        SharedStore(launch(1, free_port()))


def test_a_store_that_stops_to_answer_is_one_sentence(monkeypatch):
    """As where a link is cut: torch itself would wait for ever."""
    store = SharedStore(launch(0, free_port()))
    is_over = threading.Event()
    monkeypatch.setattr(store, "_store", Silent(is_over))
    with pytest.raises(SweepError, match=r"^the process of rank 0 is gone, or its machine cannot be reached\.$"):
        store._ask(store._store.check, 0.2)
    is_over.set()


class Silent:
    """A store that answers when it is too late."""

    def __init__(self, is_over):
        self._is_over = is_over

    def check(self):
        return self._is_over.wait(30)


def test_a_process_that_does_not_come_is_one_sentence(monkeypatch):
    first = Leader(launch(0, free_port()))
    monkeypatch.setattr(rendezvous, "JOIN_S", 0.2)
    with pytest.raises(SweepError, match=r"^the launcher's process of rank 1 did not join within 0\.2 s\.$"):
        first.start()


def test_a_process_with_another_version_is_one_sentence(monkeypatch):
    port = free_port()
    first = Leader(launch(0, port))
    monkeypatch.setattr(rendezvous.versions, "installed", lambda: ("9.9", "0123abcd"))
    Follower(launch(1, port))
    monkeypatch.undo()
    with pytest.raises(SweepError, match=r"^node \S+ has rlhfbench 9\.9 and this machine rlhfbench \S+: "):
        first.start()


def test_a_process_that_still_imports_is_waited_for_and_one_that_is_gone_is_not(monkeypatch, tmp_path):
    store = SharedStore(launch(0, free_port()))
    monkeypatch.setattr(leader, "LOST_S", -1.0)
    peer = Peer("m")
    late = LaunchedRanks(store, 1, 2, tmp_path, print, {1: peer})
    late._read(late.ranks[1], peer)
    assert late.ranks[1].exit is None
    peer.has_answered = True
    for says in ("did not answer for -1 s.", "did not answer since an earlier case."):
        gone = LaunchedRanks(store, 1, 2, tmp_path, print, {1: peer})
        gone._read(gone.ranks[1], peer)
        assert gone.ranks[1].is_lost
        assert gone.ranks[1].result["error"]["message"] == f"its process on machine m {says}"


def test_a_rank_whose_state_is_old_is_not_asleep(monkeypatch, tmp_path):
    """All ranks seem to sleep where those of another machine are out of reach: they are lost, and hang in nothing."""
    store, peer = SharedStore(launch(0, free_port())), Peer("m", has_answered=True)
    ranks = LaunchedRanks(store, 1, 2, tmp_path, print, {1: peer})
    state = {"num_beats": 1, "usage": {"cpu_s": 1.0}, "phase": "score", "result": None, "stack": "", "log": ""}
    store.write("state/1/1", {**state, "exit": None})
    ranks._read(ranks.ranks[1], peer)
    assert (ranks.ranks[1].usage.cpu_s, ranks.ranks[1].where) == (1.0, "score")
    monkeypatch.setattr(leader, "_STALE_S", -1.0)
    ranks._read(ranks.ranks[1], peer)
    assert ranks.ranks[1].usage is None
    assert not ranks.ranks[1].is_lost


def test_a_leader_ends_each_run_once():
    """Several runs of a script follow each other, and the command ends the last one again."""
    port = free_port()
    first = Leader(launch(0, port))
    follower = Follower(launch(1, port))
    for run_has_cases in (True, False):
        thread = threading.Thread(target=follower.follow, args=(None,))
        thread.start()
        first.start()
        if run_has_cases:
            first._send({"size": 1})  # a case of which this rank has no part
        first.end()
        first.end()
        thread.join(30)
        assert not thread.is_alive()
    assert first._num_messages == 3
