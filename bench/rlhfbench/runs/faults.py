"""Says what became of a case of several ranks when one of them failed: which, where, and what the others waited in."""

from __future__ import annotations

import dataclasses
import enum
import re
import signal
from collections.abc import Sequence
from typing import Any

from rlhfbench.runs.job import Exit

Result = dict[str, Any]

# Functions of torch.distributed that wait for other ranks, by the name of the collective in messages and records.
_FUNCTIONS = {
    "all_reduce": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "all_gather": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_single": "all_gather",
    "all_gather_object": "all_gather",
    "_all_gather_base": "all_gather",
    "all_gather_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "broadcast": "broadcast",
    "broadcast_object_list": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "gather_object": "gather",
    "scatter": "scatter",
    "all_to_all": "all_to_all",
    "all_to_all_single": "all_to_all",
    "barrier": "barrier",
    "monitored_barrier": "barrier",
    "init_process_group": "init_process_group",
    "new_group": "new_group",
}
# Python's faulthandler: the innermost frame first. A traceback: the innermost last.
_FRAME = re.compile(r'^  File "([^"]*)", line \d+,? in (\S+)', re.MULTILINE)
_TORCH = re.compile(r"/torch/(distributed/|_C/)")
_MAX_NAMED = 8
# torch's DistributedDataParallel waits inside the backward pass, in C++; its collective is always this one.
_BACKWARD, _OF_BACKWARD = "_engine_run_backward", "all_reduce"


class Verdict(enum.Enum):
    """Why the ranks of a case ended.

    ``ENDED``: by themselves, or since one of them failed. ``TIMEOUT``: the case took too long. ``STALL``: none of them
    used the CPU. ``SPIN``: one of them used the CPU and went on to no other phase, and the others waited for it.
    """

    ENDED = enum.auto()
    TIMEOUT = enum.auto()
    STALL = enum.auto()
    SPIN = enum.auto()


_HANGS = {
    Verdict.STALL: "hung {where}",
    Verdict.SPIN: "kept the CPU busy without progress {where}",
    Verdict.TIMEOUT: "{were} still {where} at the case's timeout",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """The usage of a rank that runs, so far.

    Attributes:
        cpu_s: CPU seconds.
        num_phases: stages of the measurement and phases of steps that it has entered.
        is_stepping: it has begun a step, and is not writing a profile: ranks do the same work from here on.
    """

    cpu_s: float
    num_phases: int = 0
    is_stepping: bool = False


@dataclasses.dataclass(slots=True)
class Rank:
    """One rank of a case, as seen from outside.

    Attributes:
        number: from 0.
        result: the result that it sent: ``outcome``, ``error`` and, of a failure, ``stack``, the traceback.
        exit: how it ended; ``None`` while it runs.
        stack: where it was when it was ended from outside, innermost frame first; empty otherwise.
        log: its log.
        usage: what it has done so far; ``None`` where that is not known, or while it waits for a disk.
        phase: the phase that it was in when it was looked at last.
        is_late: it uses the CPU, and the others wait for it.
        is_lost: the process that a launcher started for it does not answer any more.
    """

    number: int
    result: Result | None = None
    exit: Exit | None = None
    stack: str = ""
    log: str = ""
    usage: Usage | None = None
    phase: str | None = None
    is_late: bool = False
    is_lost: bool = False

    @property
    def has_failed(self) -> bool:
        """True if it sent a failure, or ended without a result."""
        if self.result is not None:
            return bool(self.result["outcome"] != "ok")
        return self.exit is not None

    @property
    def where(self) -> str:
        """The phase of a step, or the stage of the measurement, that it was in."""
        return self._told or self.phase or "start"

    @property
    def in_phase(self) -> str:
        """``in phase update``; what was seen last may be a second old."""
        return f"in phase {self._told}" if self._told else f"(last seen in phase {self.where})"

    @property
    def _told(self) -> str | None:
        reported: str | None = ((self.result or {}).get("error") or {}).get("phase")
        return reported or (None if self.exit is None else self.exit.phase)

    @property
    def collective(self) -> str | None:
        """The collective that it was in when it ended; ``None`` if in none."""
        if self.result is not None:
            lost = self.result.get("lost_peer", False)
            return collective_in(self.result.get("stack", ""), innermost_last=True, in_backward=lost) or (
                "a collective" if lost else None
            )
        return collective_in(self.stack, in_backward=True)


def collective_in(stack: str, *, innermost_last: bool = False, in_backward: bool = False) -> str | None:
    """The collective that a stack waits in; ``None`` if in none.

    Args:
        stack: As Python's faulthandler or its traceback writes it.
        innermost_last: Whether the stack is a traceback's.
        in_backward: Whether a backward pass that stands still waits for gradients of other ranks.
    """
    frames = _FRAME.findall(stack)
    found = None
    for file, name in frames if not innermost_last else frames[::-1]:
        if _TORCH.search(file.replace("\\", "/")) and name in _FUNCTIONS:
            found = _FUNCTIONS[name]  # of nested ones the outermost: barrier, and not the all_reduce in it
        elif found is not None:
            return found
    if found is None and in_backward and frames:
        inner = [name for _, name in (frames[::-1] if innermost_last else frames)]
        return _OF_BACKWARD if inner[0] == _BACKWARD else None
    return found


def judge(ranks: Sequence[Rank], verdict: Verdict, *, oom_killed: bool) -> Result | None:
    """The result of a case whose ranks did not all end well; ``None`` if they did.

    Args:
        ranks: All of them, ended.
        verdict: Why they ended.
        oom_killed: Whether Linux killed a process for memory meanwhile.
    """
    if verdict is not Verdict.ENDED:
        return _hang(ranks, verdict)
    failed = [rank for rank in ranks if rank.has_failed]
    if not failed:
        return None
    first = min(failed, key=_blame)
    others = [rank for rank in ranks if rank is not first]
    if first.result is not None:
        same = [rank.result for rank in failed if rank.result and rank.result["error"] == first.result["error"]]
        if len(same) == len(ranks) > 1:  # the case itself is wrong, and every rank says so
            return _without_stack(first.result)
        error = first.result["error"]
        message = f"rank {first.number} failed {first.in_phase}: {error['message'].rstrip('.')}{_waited(others)}"
        return {"outcome": first.result["outcome"], "error": {**error, "message": message, "phase": first.where}}
    return _death(first, others, oom_killed=oom_killed)


def _blame(rank: Rank) -> tuple[int, int]:
    """Sorts the rank that failed first to the front: the others lost a peer in a collective, or were killed for it."""
    if rank.result is None:
        was_ended_by_us = bool(rank.stack)
        return (3 if was_ended_by_us else 0), rank.number
    return (2 if rank.result.get("lost_peer") else 1), rank.number


def _death(rank: Rank, others: Sequence[Rank], *, oom_killed: bool) -> Result:
    """The result of a case of which one rank died and said nothing."""
    assert rank.exit is not None
    outcome, dead = "crashed", [rank]
    if rank.exit.code is None:  # all ranks of one machine die with its fork server
        dead += [other for other in others if other.exit is not None and other.exit.code is None]
        kind, how = "ServerDied", "died with the fork server"
    elif rank.exit.code < 0:
        kind = signal_name(-rank.exit.code)
        how = f"was killed by {kind}"
        if kind == "SIGKILL" and oom_killed:
            outcome, how = "oom", "was killed by the kernel, since the machine was out of memory,"
    else:
        kind, how = "Exit", f"exited with status {rank.exit.code} and left no result"
    message = f"{_names(dead, [rank, *others])} {how} {rank.in_phase}{_waited(others)}"
    said = last_line(rank.log)
    if outcome == "crashed" and said:
        message += f" Last line of its log: {said}"
    return {"outcome": outcome, "error": {"kind": kind, "message": message, "phase": rank.where}}


def _hang(ranks: Sequence[Rank], verdict: Verdict) -> Result:
    """The result of a case whose ranks were ended from outside."""
    late = [rank for rank in ranks if rank.is_late]
    late = late or [rank for rank in ranks if rank.result is None and rank.collective is None]
    where = " and ".join(dict.fromkeys(rank.where for rank in late or ranks))
    kind = "Timeout" if verdict is Verdict.TIMEOUT else "Hang"
    if late:
        how = _HANGS[verdict].format(were="was" if len(late) == 1 else "were", where=f"in phase {where}")
        message = f"{_names(late, ranks)} {how}{_waited([rank for rank in ranks if rank not in late])}"
    else:
        waits = "; ".join(f"rank {rank.number} in {rank.collective or 'nothing'}" for rank in ranks)
        message = f"all ranks waited for each other in phase {where}: {waits}."
    return {"outcome": "timeout", "error": {"kind": kind, "message": message, "phase": (late or ranks)[0].where}}


def _names(some: Sequence[Rank], ranks: Sequence[Rank]) -> str:
    """``rank 3``, ``ranks 1, 2``, or ``all ranks``."""
    if len(some) == 1:
        return f"rank {some[0].number}"
    if len(some) == len(ranks):
        return "all ranks"
    more = f" and {len(some) - _MAX_NAMED} more" if len(some) > _MAX_NAMED else ""
    return f"ranks {', '.join(str(rank.number) for rank in some[:_MAX_NAMED])}{more}"


def last_line(text: str) -> str:
    """The last line of ``text`` that is not blank, at most 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def signal_name(number: int) -> str:
    """The name of a signal, such as ``SIGKILL``; most real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _waited(others: Sequence[Rank]) -> str:
    """The end of a sentence: what the other ranks waited in."""
    found = dict.fromkeys(rank.collective for rank in others if rank.collective is not None)
    if not found:
        return "."
    who = "the other rank" if len(others) == 1 else "the other ranks"
    return f"; {who} waited in {' and '.join(found)}."


def _without_stack(result: Result) -> Result:
    return {key: value for key, value in result.items() if key not in ("stack", "lost_peer")}
