"""Options of the measurements of a case."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

PROFILE_NAME = "profile.json"  # in ``profile_dir``
SNAPSHOT_NAME = "snapshot.pickle"  # on CUDA
BUILD = "build"  # the stage of a case in which its models are made


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MeasurementOptions:
    """Options of the measurements of a case.

    Attributes:
        time_budget_s: Seconds for warm-up and timing together, over all blocks. The last step of a block may exceed it.
        precision: A block stops when the 95 % confidence interval of its mid-mean has this relative half-width.
        block: Number of the block. Block 0 measures memory and profile too, later ones time alone.
        turns: Path of a referee's socket that grants each timed step: see ``rlhfbench.measure.turns``. The referee
            ends the timing, too. ``None``: steps follow each other.
        step: ``module:function`` of a user's own step; ``None`` builds the case's method.
        injected: A fault to put into the step: the keyword arguments of ``InjectedStep``.
        num_blocks: Blocks of the case. ``None``: four, or one if building and preparing take more than 10 s.
        profile_dir: Folder for the profile: the profiler's traces and what they say. ``None``: no profile.
        timeline: Whether to keep a timeline of the memory measurement.
        num_threads: Threads within an op (``torch.set_num_threads``). ``None``: torch's default.
    """

    time_budget_s: float = 10.0
    precision: float = 0.02
    block: int = 0
    num_blocks: int | None = None
    turns: str | None = None
    step: str | None = None
    injected: Mapping[str, Any] | None = None
    profile_dir: str | None = None
    timeline: bool = False
    num_threads: int | None = None
