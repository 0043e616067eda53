"""Notices ranks that hang, by the CPU time that they use and the phases that they enter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from rlhfbench.runs.faults import Rank, Verdict

if TYPE_CHECKING:
    from psutil import Process

TICK_S = 1.0  # seconds between two looks
# All ranks together sleep for so long only if one of them hangs: the others wait for it in a collective.
STALL_S = 8.0
# gloo's threads alone wake a hundred times a second, which is less than 1 % of a core.
SLEEP_CPU_SHARE = 0.03
_AWAKE_S = 2.0  # a rank that used the CPU so recently is awake


class _Course:
    """One rank over time: since when it sleeps, and since when it is in the same phase."""

    def __init__(self, now_s: float) -> None:
        self._cpu_s: float | None = None
        self._num_phases, self._is_stepping = 0, False
        self.asleep_since_s = self.phase_since_s = now_s

    def note(self, rank: Rank, now_s: float) -> float:
        """Takes the usage of a rank; returns the seconds of a phase of a step that it has left, or 0."""
        usage = rank.usage
        used_s = None if usage is None or self._cpu_s is None else usage.cpu_s - self._cpu_s
        if used_s is None or not 0 <= used_s <= SLEEP_CPU_SHARE * max(now_s - self.asleep_since_s, 1.0):
            self.asleep_since_s, self._cpu_s = now_s, None if usage is None else usage.cpu_s
        if usage is None or usage.num_phases == self._num_phases:
            return 0.0
        left_s = now_s - self.phase_since_s if self._is_stepping else 0.0
        self._num_phases, self._is_stepping, self.phase_since_s = usage.num_phases, usage.is_stepping, now_s
        return left_s

    def asleep_s(self, now_s: float) -> float:
        """Seconds that the rank has slept."""
        return now_s - self.asleep_since_s

    def is_late(self, now_s: float, limit_s: float) -> bool:
        """True if the rank is awake, and has been in one phase of a step for ``limit_s``."""
        is_awake = self._cpu_s is not None and self.asleep_s(now_s) < _AWAKE_S  # None: it waits for a disk
        return is_awake and self._is_stepping and now_s - self.phase_since_s >= limit_s

    @property
    def before_sleep_s(self) -> float:
        """Seconds of the present phase before the rank fell asleep."""
        return max(0.0, self.asleep_since_s - self.phase_since_s)


class HangDetector:
    """Tells whether ranks hang, from what they were seen to do.

    - All ranks have slept for ``STALL_S``: they wait for each other, or for one that sleeps.
    - Some rank is awake and enters no phase, and all others have slept for ``STALL_S`` longer than any rank was in one
      phase of a step so far, and than they themselves were in the present one. Ranks do the same work, so a rank that
      loops for ever is told from one that is slow, on a slow machine and in the first step too.

    The second rule counts from the first phase of a step on: before it one rank may compile or load for all.

    Args:
        finds_loops: follow the second rule too.
    """

    def __init__(self, *, finds_loops: bool = True) -> None:
        self._finds_loops = finds_loops
        self._courses: dict[int, _Course] = {}
        self._longest_s = 0.0

    def verdict(self, ranks: Sequence[Rank], now_s: float) -> Verdict | None:
        """Takes the usage of all ranks; returns ``STALL`` or ``SPIN`` where they hang, and marks who is late.

        Args:
            ranks: all of them.
            now_s: of the monotonic clock.
        """
        running = [rank for rank in ranks if rank.exit is None]
        for rank in running:
            rank.is_late = False
            course = self._courses.setdefault(rank.number, _Course(now_s))
            self._longest_s = max(self._longest_s, course.note(rank, now_s))
        courses = [self._courses[rank.number] for rank in running]
        asleep = [course for course in courses if course.asleep_s(now_s) >= STALL_S]
        if not asleep:
            return None
        if len(asleep) == len(courses):
            return Verdict.STALL
        limit_s = STALL_S + max([self._longest_s, *(course.before_sleep_s for course in asleep)])
        for rank, course in zip(running, courses, strict=True):
            rank.is_late = course.is_late(now_s, limit_s)
        waits_or_is_late = [
            rank.is_late or course.asleep_s(now_s) >= limit_s for rank, course in zip(running, courses, strict=True)
        ]
        return Verdict.SPIN if self._finds_loops and all(waits_or_is_late) else None

    def allow(self, ranks: Sequence[Rank], now_s: float) -> None:
        """Allows a phase to last as long as the present one has: the ranks that sleep do not wait for one of them."""
        found = [now_s - self._courses[rank.number].phase_since_s for rank in ranks if rank.is_late]
        self._longest_s = max([self._longest_s, *found])
        for rank in ranks:
            rank.is_late = False


class CpuMeter:
    """CPU seconds of one process. Those of its children count while it sleeps itself: it may wait for a compiler."""

    def __init__(self) -> None:
        self._own_s = -1.0

    def cpu_s(self, pid: int) -> float | None:
        """CPU seconds of the process so far; ``None`` where it waits for a disk, or has ended."""
        import psutil  # here: only cases of several ranks need it

        try:
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_DISK_SLEEP:
                return None
            own_s = _seconds(process)
            sleeps, self._own_s = own_s - self._own_s <= SLEEP_CPU_SHARE * TICK_S, own_s
            # Not always: finding the children takes a look at every process of the machine.
            children = process.children(recursive=True) if sleeps else []
        except psutil.Error:
            return None
        for child in children:
            with suppress(psutil.Error):
                own_s += _seconds(child)
        return own_s


def _seconds(process: Process) -> float:
    """CPU seconds of a process, and of its children that have ended."""
    used = process.cpu_times()
    return float(used.user + used.system + used.children_user + used.children_system)
