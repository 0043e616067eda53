"""Cases of two real ranks: what they measure together, and what becomes of them when one of them misbehaves."""

import contextlib
import json
import time

import pytest

from rlhfbench.runs import hangs
from rlhfbench.runs.ranks import run_ranks

STALL_S = 3.0


@pytest.fixture
def short_stall(monkeypatch):
    """Takes ranks as hanging after ``STALL_S``."""
    monkeypatch.setattr(hangs, "STALL_S", STALL_S)


@pytest.fixture
def run(rank_server, rank_request, tmp_path, monkeypatch, is_gone):
    """Runs a case of two ranks whose step misbehaves in the given way; returns (result, exit, seconds)."""

    def run(kind, *, timeout_s=60.0, **settings):
        jobs, messages, forked = [], [], rank_server.job

        @contextlib.contextmanager
        def job(*arguments):
            with forked(*arguments) as started:
                jobs.append(started)
                yield started

        monkeypatch.setattr(rank_server, "job", job)
        request = rank_request(kind, **settings)
        started_s = time.monotonic()
        log_path = tmp_path / f"{kind}.log"
        how = {"log_path": log_path, "timeout_s": timeout_s, "on_message": messages.append}
        end = run_ranks(rank_server, request, 2, **how)
        spent_s = time.monotonic() - started_s
        (result,) = [message["result"] for message in messages if "result" in message]
        assert len(jobs[0].pids) == 2
        assert all(is_gone(pid) for pid in jobs[0].pids)
        return result, end, spent_s

    return run


def test_rank_0_sends_what_all_ranks_measured(run, tmp_path):
    result, end, _ = run("well")
    assert (result["outcome"], result["error"], end.code) == ("ok", None, 0)
    world = result["world"]
    assert (world["size"], world["parallel"], world["zero_stage"], world["gather"]) == (2, "ddp", None, None)
    # The last rank holds 20,000 bytes more: the memory of the record is its own.
    assert world["worst_rank"] == 1
    first, second = world["ranks"]
    assert second["parts"]["optimizer"] == 20_000
    assert first["parts"]["optimizer"] == 0
    assert result["memory"]["total_bytes"] == second["total_bytes"] > first["total_bytes"]
    assert result["memory"]["parts"] == second["parts"]
    # Seconds are those of one rank, and every rank took as many steps.
    seconds = result["block"]["phases"]
    assert {name: len(steps) for name, steps in seconds.items()} == dict.fromkeys(
        ("score", "update"), len(seconds["score"])
    )
    slowest = world["ranks"][world["slowest_rank"]]
    assert all(slowest["phases"][name]["mean_s"] <= max(steps) for name, steps in seconds.items())
    # Collectives: one of 256 x 256, one of 1000 elements of 4 bytes.
    assert world["collectives"] == {
        "score": {"all_reduce": {"calls": 1, "bytes": 4 * 256 * 256}},
        "update": {"all_reduce": {"calls": 1, "bytes": 4 * 1000}},
    }
    assert (world["communication_calls"], world["communication_bytes"]) == (2, 4 * (256 * 256 + 1000))
    assert 0 <= world["waiting_share"] <= 1
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("kind", ["slow", "ddp-slow"])
def test_the_others_wait_for_a_slow_rank(run, kind):
    """In Python, and in the C++ reducer of torch at the end of a backward pass."""
    world = run(kind)[0]["world"]
    waits = [rank["phases"]["update"]["waiting_s"] for rank in world["ranks"]]
    assert waits[0] > waits[1]
    assert world["imbalance"] > 0
    if kind == "ddp-slow":
        assert world["collectives"]["update"]["all_reduce"]["calls"] >= 1


def test_the_profile_is_of_the_first_rank_and_the_others_step_with_it(run, tmp_path):
    result, _, _ = run("well", profile_dir=str(tmp_path / "profile"))
    assert (result["outcome"], result["error"]) == ("ok", None)
    names = sorted(path.name.partition("-")[2] or path.name for path in (tmp_path / "profile").iterdir())
    assert names == ["profile.json", "score.json.gz", "update.json.gz"]


def test_later_blocks_are_timed_with_all_ranks(run):
    result, _, _ = run("well", block=1)
    assert result["outcome"] == "ok"
    assert set(result["block"]["phases"]) == {"score", "update"}
    assert "world" not in result


@pytest.mark.parametrize(
    ("kind", "outcome", "error"),
    [
        (
            "die",
            "crashed",
            ("SIGKILL", "rank 1 was killed by SIGKILL in phase update; the other rank waited in all_reduce."),
        ),
        (
            "out-of-memory",
            "oom",
            ("MemoryError", "rank 1 failed in phase update: no room for it; the other rank waited in all_reduce."),
        ),
        (
            "fail",
            "crashed",
            ("ValueError", "rank 1 failed in phase update: a wrong value; the other rank waited in all_reduce."),
        ),
    ],
)
def test_a_rank_that_fails_ends_the_case_and_is_named(run, kind, outcome, error):
    found = (result := run(kind)[0])["error"]  # at the case's timeout it would be one
    assert (result["outcome"], found["kind"], found["message"], found["phase"]) == (outcome, *error, "update")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("build-die", "rank 1 was killed by SIGKILL in phase build; the other rank waited in broadcast."),
        ("die-under-Ledger", "rank 1 was killed by SIGKILL in phase update; the other rank waited in all_reduce."),
        (
            "die-under-CollectiveCounter",
            "rank 1 was killed by SIGKILL in phase update; the other rank waited in all_reduce.",
        ),
    ],
)
def test_a_rank_that_dies_outside_the_timed_steps_is_named(run, kind, message):
    result, _, _ = run(kind)
    assert (result["outcome"], result["error"]["message"]) == ("crashed", message)


@pytest.mark.usefixtures("short_stall")
def test_a_rank_that_sleeps_for_ever_is_noticed_and_named(run):
    result, _, spent_s = run("hang")
    assert result["outcome"] == "timeout"
    assert result["error"] == {
        "kind": "Hang",
        "message": "rank 1 hung in phase update; the other rank waited in all_reduce.",
        "phase": "update",
    }
    assert spent_s >= STALL_S


@pytest.mark.usefixtures("short_stall")
def test_a_wait_at_the_end_of_a_backward_pass_has_the_name_of_its_collective(run):
    result, _, _ = run("ddp-hang")
    assert result["outcome"] == "timeout"
    assert result["error"]["message"] == "rank 1 hung in phase update; the other rank waited in all_reduce."


@pytest.mark.usefixtures("short_stall")
@pytest.mark.parametrize("kind", ["spin", "ddp-spin"])
def test_a_rank_that_loops_for_ever_is_noticed_and_named(run, kind):
    result, _, spent_s = run(kind)
    assert result["outcome"] == "timeout"
    assert result["error"] == {
        "kind": "Hang",
        "message": "rank 1 kept the CPU busy without progress in phase update; the other rank waited in all_reduce.",
        "phase": "update",
    }
    assert spent_s >= STALL_S


def test_a_case_that_takes_too_long_names_who_was_late(run, monkeypatch):
    monkeypatch.setattr(hangs, "STALL_S", 1000.0)
    result, _, _ = run("hang", timeout_s=10.0)  # a busy machine needs more than 4 s for the first steps
    assert result["outcome"] == "timeout"
    assert result["error"]["kind"] == "Timeout"
    assert result["error"]["message"] == (
        "rank 1 was still in phase update at the case's timeout; the other rank waited in all_reduce."
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("build-hang", "rank 1 hung in phase build; the other rank waited in broadcast."),
        ("all-profile", "rank 0 hung in phase update; the other rank waited in all_reduce."),
        ("all-hang", "all ranks hung in phase update."),
        ("all-spin", "all ranks were still in phase update at the case's timeout."),
    ],
)
def test_a_hang_outside_the_timed_steps_or_of_all_ranks_is_named(run, tmp_path, monkeypatch, kind, message):
    monkeypatch.setattr(hangs, "STALL_S", 3.0)
    how = {"profile_dir": str(tmp_path / "profile")} if kind == "all-profile" else {}
    result, _, _ = run(kind, timeout_s=10.0 if kind == "all-spin" else 60.0, **how)
    assert (result["outcome"], result["error"]["message"]) == ("timeout", message)


def test_a_fork_server_that_is_killed_names_its_ranks_and_their_phase(run):
    result, end, _ = run("kill-server")
    assert (result["outcome"], result["error"]["kind"], end.code) == ("crashed", "ServerDied", None)
    assert result["error"]["message"] == (
        f"all ranks died with the fork server (last seen in phase {result['error']['phase']})."
    )
    assert run("well")[0]["outcome"] == "ok"


def test_a_case_that_every_rank_refuses_is_refused_in_its_own_words(run):
    result, _, _ = run("well", step="rank_steps:absent")
    assert result["outcome"] == "invalid"
    assert result["error"]["message"].startswith("step is 'rank_steps:absent'")
    assert "stack" not in result
