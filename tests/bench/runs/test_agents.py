"""Ranks over the processes of a launcher: two "machines" on the loopback, each with a fork server of its own."""

import threading

import pytest

from rlhfbench.errors import SweepError
from rlhfbench.launch import Launch
from rlhfbench.runs import agents, hangs
from rlhfbench.runs.agents import Follower, Head, meet


def launch(rank, port):
    return Launch(rank=rank, size=2, local_rank=0, local_size=1, host="127.0.0.1", port=port)


@pytest.fixture(scope="module")
def run(make_rank_server, rank_server, tmp_path_factory):
    """Runs a case over two machines: the head in this thread, the other process's loop in another."""
    port = agents._free_port()
    head = Head(launch(0, port))
    other = threading.Thread(target=lambda: Follower(launch(1, port)).follow(make_rank_server()))
    other.start()
    folder = tmp_path_factory.mktemp("agents")

    def run(request, timeout_s=60.0):
        messages = []
        how = {"log_path": folder / "log", "timeout_s": timeout_s, "on_message": messages.append}
        end = head.run(rank_server, request, 2, **how)
        (result,) = [message["result"] for message in messages if "result" in message]
        return result, end

    yield run
    head.end()
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
            "rank 1 used the CPU without an end in phase update; the other rank waited in all_reduce.",
        ),
    ],
)
def test_a_rank_of_the_other_machine_that_fails_is_named(run, rank_request, monkeypatch, kind, outcome, message):
    monkeypatch.setattr(hangs, "STALL_S", 3.0)
    result, _ = run(rank_request(kind))
    assert (result["outcome"], result["error"]["message"]) == (outcome, message)
    assert run(rank_request("well"))[0]["outcome"] == "ok"


def test_a_port_in_use_is_one_sentence():
    port = agents._free_port()
    first = meet(launch(0, port))
    with pytest.raises(SweepError, match=f"^MASTER_PORT is {port}: it is in use on this machine.$"):
        meet(launch(0, port))
    del first


def test_a_head_that_does_not_answer_is_one_sentence(monkeypatch):
    monkeypatch.setattr(agents, "MEET_S", 0.2)
    with pytest.raises(SweepError, match=r"^the launcher's address is 127.0.0.1:\d+: no process of rank 0 answers"):
        meet(launch(1, agents._free_port()))


def test_a_process_that_still_imports_is_waited_for_and_one_that_is_gone_is_not(monkeypatch, tmp_path):
    store = meet(launch(0, agents._free_port()))
    monkeypatch.setattr(agents, "_LOST_S", -1.0)
    late = agents.LaunchedRanks(store, 1, 2, tmp_path, print, set())
    late._read(late.ranks[1])
    assert late.ranks[1].exit is None
    gone = agents.LaunchedRanks(store, 1, 2, tmp_path, print, {1})
    gone._read(gone.ranks[1])
    assert gone.ranks[1].result["error"]["kind"] == "LauncherDied"


def test_a_head_ends_each_run_once(monkeypatch):
    """Several runs of a script follow each other, and the command ends the last one again."""
    port = agents._free_port()
    head = Head(launch(0, port))
    follower = Follower(launch(1, port))
    for _ in range(2):
        thread = threading.Thread(target=follower.follow, args=(None,))
        thread.start()
        head._send({"size": 1})  # a case of which this rank has no part
        head.end()
        head.end()
        thread.join(30)
        assert not thread.is_alive()
    assert head._num_messages == 4
