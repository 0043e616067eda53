"""Options of the measurements of a case."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MeasurementOptions:
    """Options of the measurements of a case.

    Attributes:
        time_budget_s: Seconds for warm-up and timing together. The last step may exceed it.
        precision: Timing stops when the 95 % confidence interval of the median has this relative half-width.
        profile_dir: Folder for the profiler's traces. ``None``: no profile.
        timeline: Whether to keep a timeline of the memory measurement.
        num_threads: Threads within an op (``torch.set_num_threads``). ``None``: torch's default.
        ceilings: Result of ``measure_ceilings`` for the same device and dtype. ``None``: measure it.
    """

    time_budget_s: float = 10.0
    precision: float = 0.02
    profile_dir: str | None = None
    timeline: bool = False
    num_threads: int | None = None
    ceilings: dict[str, float] | None = None
