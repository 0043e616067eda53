"""When ranks hang, from the CPU time that they use and the phases that they enter, second by second."""

import os
import subprocess
import sys

import pytest

from rlhfbench.runs.faults import Rank, Usage, Verdict
from rlhfbench.runs.hangs import STALL_S, CpuMeter, HangDetector
from rlhfbench.runs.job import Exit


class Ranks:
    """Ranks that are looked at once a second."""

    def __init__(self, size, **how):
        self.ranks = [Rank(number, usage=Usage(cpu_s=0.0)) for number in range(size)]
        self.detector = HangDetector(**how)
        self.now_s = 0.0
        self.verdict = None

    def enter(self, *numbers):
        """These ranks enter a phase of a step."""
        for number in numbers or range(len(self.ranks)):
            usage = self.ranks[number].usage
            self.ranks[number].usage = Usage(usage.cpu_s, usage.num_phases + 1, is_stepping=True)

    def run(self, for_s, busy=(), cpu_share=1.0):
        """Lets time pass in which these ranks use the CPU; returns the seconds until a verdict, or ``None``."""
        for second in range(1, int(for_s) + 1):
            self.now_s += 1.0
            for number in busy:
                usage = self.ranks[number].usage
                self.ranks[number].usage = Usage(usage.cpu_s + cpu_share, usage.num_phases, usage.is_stepping)
            self.verdict = self.detector.verdict(self.ranks, self.now_s)
            if self.verdict is not None:
                return second
        return None


@pytest.fixture
def make():
    return Ranks


def test_ranks_that_all_sleep_hang(make):
    ranks = make(2)
    assert ranks.run(30, busy=(0, 1)) is None
    assert ranks.run(30) == STALL_S
    assert ranks.verdict is Verdict.STALL


def test_the_threads_of_gloo_are_no_work(make):
    ranks = make(2)
    assert ranks.run(30, busy=(0, 1), cpu_share=0.01) is not None
    assert ranks.verdict is Verdict.STALL


def test_a_rank_that_is_awake_without_an_end_hangs(make):
    ranks = make(4)
    for _ in range(3):
        ranks.enter()
        assert ranks.run(1, busy=range(4)) is None
    ranks.enter()
    found_s = ranks.run(60, busy=(2,))
    assert ranks.verdict is Verdict.SPIN
    assert [rank.is_late for rank in ranks.ranks] == [False, False, True, False]
    assert STALL_S < found_s <= STALL_S + 3


def test_where_completions_may_end_early_a_rank_may_be_late_for_long(make):
    ranks = make(2, finds_loops=False)
    ranks.enter()
    assert ranks.run(500, busy=(1,)) is None
    assert ranks.run(30) == STALL_S


def test_a_rank_may_be_late_by_as_much_as_a_phase_took_so_far(make):
    ranks = make(2)
    ranks.enter()
    assert ranks.run(20, busy=(0, 1)) is None
    ranks.enter()
    assert ranks.run(20 + STALL_S - 3, busy=(1,)) is None
    assert ranks.run(5, busy=(1,)) is not None


def test_what_the_others_needed_for_the_first_phase_is_what_a_rank_may_be_late_by(make):
    """On a slow machine the first step is the slowest of all."""
    ranks = make(2)
    ranks.enter()
    assert ranks.run(30, busy=(0, 1)) is None
    assert ranks.run(30 + STALL_S - 3, busy=(1,)) is None
    assert ranks.run(5, busy=(1,)) is not None
    assert ranks.verdict is Verdict.SPIN


def test_a_rank_that_enters_phases_is_late_for_no_one(make):
    ranks = make(2)
    ranks.enter()
    for _ in range(20):
        assert ranks.run(5, busy=(1,)) is None
        ranks.enter(1)


def test_before_the_first_step_and_in_a_profile_one_rank_may_work_for_all(make):
    assert make(2).run(500, busy=(1,)) is None
    ranks = make(2)
    ranks.enter()
    ranks.run(2, busy=(0, 1))
    usage = ranks.ranks[0].usage
    ranks.ranks[0].usage = Usage(usage.cpu_s, usage.num_phases + 1, is_stepping=False)
    assert ranks.run(500, busy=(0,)) is None


def test_a_rank_that_waits_for_a_disk_does_not_sleep_and_is_not_late(make):
    ranks = make(2)
    ranks.enter()
    ranks.run(2, busy=(0, 1))
    ranks.ranks[1].usage = None
    assert ranks.run(100) is None


def test_where_nobody_waits_nobody_is_late(make):
    ranks = make(2)
    ranks.enter()
    ranks.ranks[0].exit = Exit(pid=1, code=0, max_rss_bytes=1)
    assert ranks.run(100, busy=(1,)) is None
    ranks.ranks[1].exit = ranks.ranks[0].exit
    assert ranks.run(100) is None


def test_a_wait_that_was_no_hang_may_last_as_long_again(make):
    ranks = make(2)
    ranks.enter()
    first_s = ranks.run(60, busy=(1,))
    assert ranks.verdict is Verdict.SPIN
    ranks.detector.allow(ranks.ranks, ranks.now_s)
    assert not any(rank.is_late for rank in ranks.ranks)
    assert ranks.run(60, busy=(1,)) >= STALL_S - 1
    assert ranks.now_s >= 2 * first_s - 2


def test_a_process_that_waits_for_a_child_does_not_sleep():
    """A rank may compile."""
    # The child spins until its standard input ends, and its parent waits for it.
    spin = "import select, sys\nwhile not select.select([sys.stdin], [], [], 0)[0]: pass"
    wait = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}])"
    with subprocess.Popen([sys.executable, "-c", wait], stdin=subprocess.PIPE) as process:
        try:
            meter, found = CpuMeter(), []
            for _ in range(5000):
                if len(found) > 2 and found[-1] - found[1] >= 0.1:
                    break
                seconds = meter.cpu_s(process.pid)
                found += [] if seconds is None else [seconds]
        finally:
            process.communicate()
    assert found[-1] - found[1] >= 0.1


def test_a_process_that_is_gone_has_no_usage():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert process.pid != os.getpid()
    assert CpuMeter().cpu_s(process.pid) is None
