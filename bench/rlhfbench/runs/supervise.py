"""Watches the ranks of a case, and ends all of them when one fails or hangs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from rlhfbench.runs.faults import Rank, Verdict, judge
from rlhfbench.runs.forkserver_process import Message
from rlhfbench.runs.hangs import TICK_S, HangDetector
from rlhfbench.runs.job import Exit

GRACE_S = 4.0  # seconds that ranks have to notice the end of another
_DUMP_S = 1.5


class RankProcesses(Protocol):
    """The processes of all ranks, wherever they run."""

    ranks: list[Rank]

    def wait(self, timeout_s: float) -> None:
        """Waits for a message or an exit of some rank, and takes it."""

    def look(self) -> None:
        """Takes the usage of every rank that runs."""

    def dump(self) -> None:
        """Has every rank that runs write its stack."""

    def take_stacks(self) -> None:
        """Reads the stacks that were written after ``dump``."""

    def kill(self) -> None:
        """Kills every rank that runs."""

    def abandon(self) -> None:
        """Notes that ranks cannot be killed, since who starts them is gone."""


def detector_for(request: Message) -> HangDetector | None:
    """The detector of ranks that hang; ``None`` where two cases step in turns, and all ranks of one may just wait."""
    if request["settings"].get("turns"):
        return None
    rollout: Message = request["case"]["options"].get("rollout") or {}
    # Where completions may end early, one rank may rightly generate for much longer than the others.
    return HangDetector(finds_loops=rollout.get("stop_token_id") is None)


def supervise(ranks: RankProcesses, timeout_s: float | None, detector: HangDetector | None) -> Verdict:
    """Waits until all ranks have ended; ends them when one fails or is lost, all sleep, or ``timeout_s`` is over.

    Args:
        ranks: The processes.
        timeout_s: Seconds from now.
        detector: Looks for ranks that hang.

    Returns:
        Why the ranks were ended; ``Verdict.ENDED`` where they ended by themselves.
    """
    deadline_s = float("inf") if timeout_s is None else time.monotonic() + timeout_s
    looked_s, failed_s = 0.0, float("inf")
    while any(rank.exit is None for rank in ranks.ranks):
        now_s = time.monotonic()
        if now_s >= min(deadline_s, failed_s + GRACE_S):
            verdict = Verdict.TIMEOUT if now_s >= deadline_s else Verdict.ENDED
            _end(ranks)
            return verdict
        ranks.wait(max(0.0, min(TICK_S, deadline_s - now_s)))
        if any(rank.is_lost for rank in ranks.ranks):
            failed_s = 0.0  # the others have waited for it
        elif any(rank.has_failed for rank in ranks.ranks):
            failed_s = min(failed_s, time.monotonic())
        elif detector is not None and time.monotonic() >= looked_s + TICK_S:
            looked_s = time.monotonic()
            ranks.look()
            found = detector.verdict(ranks.ranks, looked_s)
            if found is not None and _hang(ranks, found, detector):
                return found
    return Verdict.ENDED


def _hang(ranks: RankProcesses, found: Verdict, detector: HangDetector) -> bool:
    """Ends ranks that hang. Not those of which some sleep in no collective: they wait for something else."""
    if found is Verdict.STALL:
        _end(ranks)
        return True
    _read_stacks(ranks)
    running = [rank for rank in ranks.ranks if rank.exit is None]
    if any(rank.has_failed for rank in ranks.ranks) or any(
        rank.collective is None and not rank.is_late for rank in running
    ):
        for rank in running:
            rank.stack = ""
        detector.allow(ranks.ranks, time.monotonic())
        return False
    _kill(ranks)
    return True


def _end(ranks: RankProcesses) -> None:
    """Reads the stacks of the ranks that run, then kills them and waits for their end."""
    _read_stacks(ranks)
    _kill(ranks)


def _read_stacks(ranks: RankProcesses) -> None:
    ranks.dump()
    wait_for_end(ranks, _DUMP_S)
    ranks.take_stacks()


def _kill(ranks: RankProcesses) -> None:
    ranks.kill()
    wait_for_end(ranks, 2 * GRACE_S)
    ranks.abandon()


def wait_for_end(ranks: RankProcesses, for_s: float) -> None:
    """Waits for the end of all ranks, at most ``for_s``."""
    until_s = time.monotonic() + for_s
    while any(rank.exit is None for rank in ranks.ranks) and (left_s := until_s - time.monotonic()) > 0:
        ranks.wait(left_s)


def conclude(
    ranks: Sequence[Rank],
    verdict: Verdict,
    logs: Sequence[Path],
    on_message: Callable[[Message], None],
    *,
    oom_killed: bool,
) -> Exit:
    """Sends the result of a case whose ranks have ended, and returns the exit of rank 0.

    Args:
        ranks: All of them.
        verdict: Why they ended.
        logs: Of the ranks of this machine, rank 0 first. Empty ones of later ranks are deleted.
        on_message: Receives the result: that of rank 0, or the fault.
        oom_killed: Whether Linux killed a process for memory meanwhile.
    """
    for rank, path in zip(ranks, logs, strict=False):
        rank.log = path.read_text(errors="replace")
        if rank.number and not path.stat().st_size:
            path.unlink()
    ends = [rank.exit for rank in ranks if rank.exit is not None]
    fault = judge(ranks, verdict, oom_killed=oom_killed)
    result = fault or ranks[0].result
    on_message({"result": result})
    peaks = [end.max_rss_bytes for end in ends if end.max_rss_bytes is not None]
    return dataclasses.replace(ends[0], max_rss_bytes=max(peaks, default=None), timed_out=False)
