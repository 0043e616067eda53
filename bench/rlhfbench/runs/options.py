"""The options of a run: how its cases are run. None of them defines a case."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Self

from annotated_types import Ge, Gt, Le

from rlhfbench.cases.sizes import MAX_BYTES
from rlhfbench.errors import SweepError
from rlhfkernels.config.rules import checked, hints

MAX_SECONDS = 1_000_000  # epoll waits 24 days at most
MAX_THREADS = 1024
MAX_BLOCKS = 1000
MAX_BATCH = 512  # that a search for the largest batch tries

Seconds = Annotated[float, Gt(0), Le(MAX_SECONDS)]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """Options of a run.

    Attributes:
        time_budget_s: seconds for timing the steps of a case, over all its blocks.
        blocks: blocks of each case, each in a process of its own, from the second on in random order; ``None``: four,
            or one for a case that takes more than 10 s to build and to prepare.
        precision: relative error of a block's mid-mean at which its timing stops earlier.
        num_threads: torch's threads in each case; ``None`` leaves torch's choice.
        profile: trace the phases of each case, into ``traces/``.
        with_plan: predict the memory of each case too, in a process of its own before the case's.
        case_timeout_s: seconds after which a case is killed.
        memory_limit_bytes: bytes that a case, or each of its ranks, may allocate before it counts as out of memory;
            ``None`` is no limit.

    Raises:
        SweepError: some field breaks its rule; every problem is named.
    """

    time_budget_s: Seconds = 1.2
    blocks: Annotated[int, Ge(1), Le(MAX_BLOCKS)] | None = None
    precision: Annotated[float, Gt(0), Le(1)] = 0.02
    num_threads: Annotated[int, Ge(1), Le(MAX_THREADS)] | None = None
    profile: bool = False
    with_plan: bool = False
    case_timeout_s: Seconds = 600.0
    memory_limit_bytes: Annotated[int, Ge(1), Le(MAX_BYTES)] | None = None

    def __post_init__(self) -> None:
        problems = []
        for name, annotation in hints(RunOptions).items():
            value, problem = checked(name, getattr(self, name), annotation)
            object.__setattr__(self, name, value)
            problems += [] if problem is None else [problem]
        if problems:
            raise SweepError(problems)

    @classmethod
    def recorded(cls, settings: Mapping[str, Any]) -> Self:
        """The options among the ``settings`` of an environment; other keys, of other versions, are ignored.

        Raises:
            SweepError: a recorded value breaks its rule.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in settings.items() if name in names})
