"""The options of a run: how its cases are run. None of them defines a case."""

from __future__ import annotations

import dataclasses

from rlhfbench.errors import SweepError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """Options of a run.

    Attributes:
        time_budget_s: seconds for timing the steps of a case.
        precision: relative error of the median at which timing stops earlier.
        num_threads: torch's threads in each case; ``None`` leaves torch's choice.
        profile: trace the phases of each case, into ``traces/``.
        with_plan: predict the memory of each case too, in a process of its own before the case's.
        case_timeout_s: seconds after which a case is killed.
        memory_limit_bytes: bytes that a case may allocate before it counts as out of memory; ``None`` is no limit.

    Raises:
        SweepError: some field breaks its rule; every problem is named.
    """

    time_budget_s: float = 2.0
    precision: float = 0.02
    num_threads: int | None = None
    profile: bool = False
    with_plan: bool = False
    case_timeout_s: float = 600.0
    memory_limit_bytes: int | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}: it must be above 0."
            for name in ("time_budget_s", "precision", "num_threads", "case_timeout_s", "memory_limit_bytes")
            if getattr(self, name) is not None and not getattr(self, name) > 0
        ]
        if problems:
            raise SweepError(problems)
