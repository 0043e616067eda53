"""The goals that evidence is held to, and what was measured of each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from rlhfbench.evidence.request import GIB, PAPER_TOTAL_GIB
from rlhfbench.records.derived import at, disturbed_seconds
from rlhfbench.records.file import Record
from rlhfkernels.methods.table import METHODS

MIN_DECODE_FRACTION, DECODE_BATCHES = 0.6, range(16, 65)
MIN_UPDATE_FRACTION = 0.45
MAX_STEP_S = 0.5  # a sample
MAX_PLAN_ERROR = 0.03


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Measurements of the parts.

    Attributes:
        on_cuda: the goals are for a CUDA device; elsewhere what was found is shown without a verdict.
        records: of the run of the methods.
        decode: the items of ``decode.json``.
    """

    on_cuda: bool
    records: Sequence[Record]
    decode: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """One goal.

    Attributes:
        text: what is to be reached.
        values: what was found, as text, and whether it is enough.
    """

    text: str
    values: Callable[[Measured], list[tuple[str, bool]]]

    def verdict(self, found: Measured) -> tuple[str, str]:
        """Returns what was found, and ``reached``, ``missed`` or ``not measured``; the last of a CPU."""
        values = self.values(found)
        shown = "; ".join(text for text, _ in values)
        if not values or not found.on_cuda:
            return shown, "not measured" if not values else "for a CUDA device"
        return shown, "reached" if all(enough for _, enough in values) else "missed"


def _decode(found: Measured) -> list[tuple[str, bool]]:
    """The best of each batch, with CUDA graphs or without."""
    best: dict[int, dict[str, Any]] = {}
    for key, item in found.decode.items():
        if key.startswith("batch ") and "failed" not in item and item["batch_size"] in DECODE_BATCHES:
            known = best.setdefault(item["batch_size"], item)
            best[item["batch_size"]] = max(known, item, key=lambda each: each["floor_fraction"])
    values = []
    for batch_size, item in best.items():
        fraction = item["floor_fraction"]
        values.append((f"batch {batch_size}: {fraction:.2f} {item['by']}", fraction >= MIN_DECODE_FRACTION))
    return values


def _update(found: Measured) -> list[tuple[str, bool]]:
    values = []
    for record in found.records:
        names = [phase.name for phase in METHODS[record["case"]["method"]].phases if phase.kind == "update"]
        floors_s = [at(record, f"work.phases.{name}.floor_s") for name in names]
        means_s = [at(record, f"latency.phases.{name}.mean_s") for name in names]
        if None not in (*floors_s, *means_s) and sum(means_s):
            fraction = sum(floors_s) / sum(means_s)
            text = f"{record['case']['method']}: {fraction:.2f}{_beside(record)}"
            values.append((text, fraction >= MIN_UPDATE_FRACTION))
    return values


def _step(method: str, found: Measured) -> list[tuple[str, bool]]:
    """Seconds and memory of a step of ``method``."""
    values = []
    for record in found.records:
        seconds, total = at(record, "latency.total_s_per_sample"), at(record, "memory.total_bytes")
        if record["case"]["method"] == method and None not in (seconds, total):
            enough = seconds <= MAX_STEP_S and total <= PAPER_TOTAL_GIB * GIB
            values.append((f"{seconds:.3f} s in {total / GIB:.3g} GiB{_beside(record)}", enough))
    return values


def _beside(record: Record) -> str:
    """The disturbances of the seconds of ``record``, in parentheses; empty if there were none."""
    by = disturbed_seconds(record)
    return "" if by is None else f" (disturbed: {by})"


def _plan(found: Measured) -> list[tuple[str, bool]]:
    values = []
    for record in found.records:
        error = plan_error(record)
        if error is not None:
            values.append((f"{record['case']['method']}: {100 * error:+.1f} %", abs(error) <= MAX_PLAN_ERROR))
    return values


def plan_error(record: Record) -> float | None:
    """Returns the planned total beyond the allocator's peak without library workspaces, as a share of that peak."""
    planned = at(record, "plan.total_bytes")
    peak = at(record, "memory.views.allocator_peak_bytes")
    if not planned or not peak:
        return None
    peak -= at(record, "memory.views.workspace_bytes") or 0
    return float(planned / peak - 1)


GOALS = (
    Goal(text=f"decode ≥ {MIN_DECODE_FRACTION} of the bandwidth floor at batches 16 to 64", values=_decode),
    Goal(text=f"update ≥ {MIN_UPDATE_FRACTION} of its roofline at the measured GEMM rate", values=_update),
    Goal(
        text=f"Hydra-PPO ≤ {MAX_STEP_S} s a sample within {PAPER_TOTAL_GIB} GiB",
        values=functools.partial(_step, "hydra"),
    ),
    Goal(text=f"plan within {100 * MAX_PLAN_ERROR:.0f} % of the allocator", values=_plan),
)
