import pytest

from rlhfbench.runs.faults import Rank, Verdict, collective_in, judge
from rlhfbench.runs.job import Exit

TORCH = "/site-packages/torch/distributed"
DUMP_OF_A_BARRIER = f"""Current thread 0x1 (most recent call first):
  File "{TORCH}/distributed_c10d.py", line 3105 in all_reduce
  File "{TORCH}/distributed_c10d.py", line 5017 in barrier
  File "{TORCH}/c10d_logger.py", line 83 in wrapper
  File "/lib/step.py", line 7 in run
"""
DUMP_OF_A_BACKWARD = """Current thread 0x1 (most recent call first):
  File "/site-packages/torch/autograd/graph.py", line 869 in _engine_run_backward
  File "/lib/step.py", line 7 in run
"""
DUMP_OF_WORK = """Current thread 0x1 (most recent call first):
  File "/lib/all_reduce.py", line 7 in all_reduce
"""
TRACEBACK = f"""Traceback (most recent call last):
  File "/lib/step.py", line 7, in run
    dist.all_gather_into_tensor(a, b)
  File "{TORCH}/distributed_c10d.py", line 3105, in all_gather_into_tensor
    work.wait()
RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer
"""


def ended(number, code=0, *, phase="update", **fields):
    return Rank(number, exit=Exit(pid=1, code=code, max_rss_bytes=1, phase=phase), **fields)


def failed(number, kind, message, *, outcome="crashed", **fields):
    error = {"kind": kind, "message": message, "phase": "update"}
    return ended(number, result={"outcome": outcome, "error": error, **fields})


def lost(number):
    return failed(number, "RuntimeError", "Connection closed by peer", stack=TRACEBACK, lost_peer=True)


OK = {"outcome": "ok", "error": None}


@pytest.mark.parametrize(
    ("stack", "how", "collective"),
    [
        (DUMP_OF_A_BARRIER, {}, "barrier"),
        (DUMP_OF_A_BACKWARD, {}, None),
        (DUMP_OF_A_BACKWARD, {"in_backward": True}, "all_reduce"),
        (DUMP_OF_WORK, {"in_backward": True}, None),
        (TRACEBACK, {"innermost_last": True}, "all_gather"),
        ("", {"in_backward": True}, None),
    ],
)
def test_the_collective_of_a_stack(stack, how, collective):
    assert collective_in(stack, **how) == collective


def test_ranks_that_end_well_have_no_fault():
    assert judge([ended(0, result=OK), ended(1, result=OK)], Verdict.ENDED, oom_killed=False) is None


def test_the_rank_that_died_is_to_blame_and_not_those_that_lost_it():
    for ranks in ([lost(0), ended(1, -9), lost(2)], [lost(0), lost(1), ended(2, -9)]):
        number = next(rank.number for rank in ranks if rank.result is None)
        found = judge(ranks, Verdict.ENDED, oom_killed=False)
        assert found["outcome"] == "crashed"
        assert found["error"] == {
            "kind": "SIGKILL",
            "message": f"rank {number} was killed by SIGKILL in phase update; the other ranks waited in all_gather.",
            "phase": "update",
        }


def test_a_signal_without_a_name_has_its_number():
    found = judge([lost(0), ended(1, -40)], Verdict.ENDED, oom_killed=False)
    assert found["error"]["kind"] == "signal 40"
    assert found["error"]["message"].startswith("rank 1 was killed by signal 40 in phase update;")


def test_a_kill_by_the_kernel_is_out_of_memory():
    found = judge([lost(0), ended(1, -9)], Verdict.ENDED, oom_killed=True)
    assert (found["outcome"], found["error"]["kind"]) == ("oom", "SIGKILL")
    assert found["error"]["message"].startswith("rank 1 was killed by the kernel, since the machine was out of memory,")


def test_an_error_comes_before_a_lost_peer_and_before_a_rank_that_was_ended_for_it():
    late = ended(2, -9, stack=DUMP_OF_A_BARRIER)
    found = judge([lost(0), failed(1, "ValueError", "it is wrong."), late], Verdict.ENDED, oom_killed=False)
    assert found["error"]["kind"] == "ValueError"
    assert found["error"]["message"] == (
        "rank 1 failed in phase update: it is wrong; the other ranks waited in all_gather and barrier."
    )


def test_an_exit_without_a_result_quotes_the_log():
    found = judge([lost(0), ended(1, 3, log="one\ntwo\n\n")], Verdict.ENDED, oom_killed=False)
    assert found["error"]["kind"] == "Exit"
    assert found["error"]["message"].startswith("rank 1 exited with status 3 and left no result in phase update;")
    assert found["error"]["message"].endswith("Last line of its log: two")


def test_an_error_of_every_rank_is_the_case_s_own():
    ranks = [failed(n, "CaseError", "too short.", outcome="invalid", stack="x", lost_peer=False) for n in range(2)]
    error = {"kind": "CaseError", "message": "too short.", "phase": "update"}
    assert judge(ranks, Verdict.ENDED, oom_killed=False) == {"outcome": "invalid", "error": error}


def test_ranks_that_wait_for_each_other_are_all_named():
    ranks = [ended(0, -9, stack=DUMP_OF_A_BARRIER), ended(1, -9, stack=DUMP_OF_A_BACKWARD)]
    found = judge(ranks, Verdict.STALL, oom_killed=False)
    assert (found["outcome"], found["error"]["kind"]) == ("timeout", "Hang")
    assert found["error"]["message"] == (
        "all ranks waited for each other in phase update: rank 0 in barrier; rank 1 in all_reduce."
    )


def test_a_rank_that_was_late_at_the_timeout_is_named():
    ranks = [ended(0, -9, stack=DUMP_OF_A_BARRIER), ended(1, -9, stack=DUMP_OF_WORK, phase="generate")]
    found = judge(ranks, Verdict.TIMEOUT, oom_killed=False)
    assert found["error"] == {
        "kind": "Timeout",
        "message": "rank 1 was still in phase generate at the case's timeout; the other rank waited in barrier.",
        "phase": "generate",
    }


def test_ranks_that_die_with_a_fork_server_are_named_with_their_phase():
    ranks = [ended(0, None, phase=None), ended(1, None, phase=None), ended(2, -9, stack=DUMP_OF_A_BARRIER)]
    ranks[0].phase = "score"
    found = judge(ranks, Verdict.ENDED, oom_killed=False)
    assert (found["outcome"], found["error"]["kind"]) == ("crashed", "ServerDied")
    assert found["error"]["message"] == (
        "ranks 0, 1 died with the fork server (last seen in phase score); the other ranks waited in barrier."
    )
    alone = judge(ranks[:2], Verdict.ENDED, oom_killed=False)
    assert alone["error"]["message"] == "all ranks died with the fork server (last seen in phase score)."


@pytest.mark.parametrize(
    ("verdict", "phases", "message"),
    [
        (Verdict.TIMEOUT, ("score", "score"), "all ranks were still in phase score at the case's timeout."),
        (Verdict.TIMEOUT, ("score", "update"), "all ranks were still in phase score and update at the case's timeout."),
        (Verdict.STALL, ("build", "build"), "all ranks hung in phase build."),
    ],
)
def test_ranks_that_all_hang_are_all_named(verdict, phases, message):
    ranks = [ended(number, -9, stack=DUMP_OF_WORK, phase=phase) for number, phase in enumerate(phases)]
    found = judge(ranks, verdict, oom_killed=False)
    assert (found["outcome"], found["error"]["message"]) == ("timeout", message)


def test_of_many_ranks_the_first_are_named():
    ranks = [ended(0, -9, stack=DUMP_OF_A_BARRIER), *(ended(n, -9, stack=DUMP_OF_WORK) for n in range(1, 12))]
    found = judge(ranks, Verdict.STALL, oom_killed=False)
    assert found["error"]["message"] == (
        "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 3 more hung in phase update; the other rank waited in barrier."
    )
