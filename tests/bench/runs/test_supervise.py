"""Ranks that seem to hang: they are ended only where the others wait in a collective."""

import pytest

from rlhfbench.runs import supervise as module
from rlhfbench.runs.faults import Rank, Usage, Verdict
from rlhfbench.runs.job import Exit
from rlhfbench.runs.supervise import detector_for, supervise

IN_A_BARRIER = 'Stack:\n  File "/torch/distributed/distributed_c10d.py", line 5 in barrier\n'
AT_A_LOCK = 'Stack:\n  File "/lib/remembered.py", line 31 in remembered\n'


class Ranks:
    """Two ranks of which the second is late, and which end with the second stack or when they are killed."""

    def __init__(self, *stacks):
        self.ranks = [Rank(0), Rank(1)]
        self.stacks, self.num_stacks, self.is_killed = stacks, 0, False

    def wait(self, timeout_s):
        if self.is_killed or self.num_stacks == len(self.stacks):
            self.end()

    def end(self):
        for rank in self.ranks:
            rank.result = None if self.is_killed else {"outcome": "ok", "error": None}
            rank.exit = Exit(pid=1, code=-9 if self.is_killed else 0, max_rss_bytes=1)

    def look(self):
        for rank in self.ranks:
            rank.usage = Usage(1.0, 1, True)

    def dump(self):
        pass

    def take_stacks(self):
        self.ranks[0].stack, self.ranks[1].stack = self.stacks[self.num_stacks], "Stack:\n"
        self.num_stacks += 1

    def kill(self):
        self.is_killed = True

    def abandon(self):
        self.end()


class Suspicious:
    """A detector that finds the second rank late whenever it is asked."""

    allowed = 0

    def verdict(self, ranks, now_s):
        ranks[1].is_late = ranks[1].exit is None
        return Verdict.SPIN if ranks[1].is_late else None

    def allow(self, ranks, now_s):
        Suspicious.allowed += 1


@pytest.fixture(autouse=True)
def _suspicious(monkeypatch):
    monkeypatch.setattr(module, "TICK_S", 0.0)
    monkeypatch.setattr(module, "_DUMP_S", 0.0)
    monkeypatch.setattr(Suspicious, "allowed", 0)


def test_ranks_whose_others_wait_in_a_collective_are_ended():
    found = Ranks(IN_A_BARRIER, "")
    assert supervise(found, 60.0, Suspicious()) is Verdict.SPIN
    assert found.is_killed
    assert found.ranks[0].collective == "barrier"


def test_ranks_whose_others_wait_for_something_else_go_on_and_keep_no_stack():
    found = Ranks(AT_A_LOCK)
    assert supervise(found, 60.0, Suspicious()) is Verdict.ENDED
    assert (found.is_killed, Suspicious.allowed) == (False, 1)
    assert [rank.stack for rank in found.ranks] == ["", ""]


def test_ranks_without_a_detector_are_not_watched():
    found = Ranks()
    found.look = lambda: pytest.fail("it was looked at")
    assert supervise(found, 60.0, None) is Verdict.ENDED


def test_steps_in_turns_are_not_watched_and_loops_are_not_found_where_completions_end_early():
    case = {"options": {"parallel": {"strategy": "ddp"}}}
    assert detector_for({"settings": {"turns": "path"}, "case": case}) is None
    assert detector_for({"settings": {}, "case": case})._finds_loops
    early = {"options": {"rollout": {"stop_token_id": 0}}}
    assert not detector_for({"settings": {}, "case": early})._finds_loops
