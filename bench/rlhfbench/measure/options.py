"""How a case is measured, apart from what it is."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MeasurementOptions:
    """How a case is measured.

    Attributes:
        time_budget_s: for the warm-up and the timing pass together; the last step may run over it.
        precision: the relative half-width of the median's 95 % confidence interval that is precise enough.
        profile_dir: where the profiler pass puts its traces; ``None``: there is no profiler pass.
        timeline: whether the memory pass keeps its timeline too.
        num_threads: torch's threads within an op; ``None`` leaves torch's own choice.
        ceilings: what ``measure_ceilings`` found for the same device and dtype; ``None``: it is measured now.
    """

    time_budget_s: float = 10.0
    precision: float = 0.02
    profile_dir: str | None = None
    timeline: bool = False
    num_threads: int | None = None
    ceilings: dict[str, float] | None = None
