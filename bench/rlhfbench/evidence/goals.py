"""The goals that evidence is held to, and what was measured of each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhfbench.evidence.request import GIB, PAPER_TOTAL_GIB
from rlhfbench.records.derived import at, disturbed_seconds
from rlhfbench.records.file import Record
from rlhfkernels.methods.table import METHODS

MIN_DECODE_FRACTION, DECODE_BATCHES = 0.6, range(16, 65)
MIN_UPDATE_FRACTION = 0.45
MAX_STEP_S = 0.5  # a sample
MAX_PLAN_ERROR = 0.03

Value = tuple[str, bool | None]  # what was found, and whether it is enough: ``None`` where it is not measured


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Measurements of the parts.

    Attributes:
        on_cuda: the goals are for a CUDA device; elsewhere what was found is shown without a verdict.
        records: of the run of the methods.
        decode: the items of ``decode.json``.
        methods: those that the run of the methods has, without those that do not fit.
        decode_batches: those that ``decode.json`` has, once its part is done.
    """

    on_cuda: bool
    records: Sequence[Record]
    decode: dict[str, Any]
    methods: Sequence[str] = ()
    decode_batches: Sequence[int] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """One goal.

    Attributes:
        text: what is to be reached.
        values: what was found, one for each batch or method.
    """

    text: str
    values: Callable[[Measured], list[Value]]

    def verdict(self, found: Measured) -> tuple[str, str]:
        """Returns what was found, and ``reached``, ``missed``, ``partly measured`` or ``not measured``.

        The verdict of what was found on a CPU is ``for a CUDA device``.
        """
        values = self.values(found)
        enough = [value for _, value in values]
        if all(value is None for value in enough):
            return "", "not measured"
        shown = "; ".join(text for text, _ in values)
        if not found.on_cuda:
            return shown, "for a CUDA device"
        if False in enough:
            return shown, "missed"
        return shown, "partly measured" if None in enough else "reached"


def _decode(found: Measured) -> list[Value]:
    """The best of each batch, with CUDA graphs or without; ``None`` in place of one that failed in every way."""
    best: dict[int, dict[str, Any] | None] = {}
    for key, item in found.decode.items():
        if key.startswith("batch ") and item["batch_size"] in DECODE_BATCHES:
            known = best.setdefault(item["batch_size"], None)
            if "failed" not in item and (known is None or item["floor_fraction"] > known["floor_fraction"]):
                best[item["batch_size"]] = item
    sizes = sorted(best.keys() | {size for size in found.decode_batches if size in DECODE_BATCHES})
    return [_of_batch(size, best) for size in sizes]


def _of_batch(size: int, best: Mapping[int, dict[str, Any] | None]) -> Value:
    """The value of a batch."""
    if size not in best:
        return f"batch {size}: not measured", None
    item = best[size]
    if item is None:
        return f"batch {size}: failed", False
    fraction = item["floor_fraction"]
    return f"batch {size}: {fraction:.2f} {item['by']}", fraction >= MIN_DECODE_FRACTION


def _of_methods(found: Measured, measure: Callable[[Record], tuple[str, bool] | None]) -> list[Value]:
    """A value for each method: that of ``measure``, or the outcome of a case that failed, which is not enough."""
    values: list[Value] = []
    for record in found.records:
        what: tuple[str, bool] | None = measure(record) if record["outcome"] == "ok" else (record["outcome"], False)
        text, enough = what or ("not measured", None)
        values.append((f"{record['case']['method']}: {text}", enough))
    known = {record["case"]["method"] for record in found.records}
    return [*values, *((f"{name}: not measured", None) for name in found.methods if name not in known)]


def _update(record: Record) -> tuple[str, bool] | None:
    """The share of the roofline that the updates of a case reach."""
    names = [phase.name for phase in METHODS[record["case"]["method"]].phases if phase.kind == "update"]
    floors_s = [at(record, f"work.phases.{name}.floor_s") for name in names]
    means_s = [at(record, f"latency.phases.{name}.mean_s") for name in names]
    if None in (*floors_s, *means_s) or not sum(means_s):
        return None
    fraction = sum(floors_s) / sum(means_s)
    return f"{fraction:.2f}{_beside(record)}", fraction >= MIN_UPDATE_FRACTION


def _step(method: str, found: Measured) -> list[Value]:
    """Seconds and memory of a step of ``method``."""
    values: list[Value] = []
    for record in found.records:
        if record["case"]["method"] != method:
            continue
        seconds, total = at(record, "latency.total_s_per_sample"), at(record, "memory.total_bytes")
        if record["outcome"] != "ok":
            values.append((record["outcome"], False))
        elif None not in (seconds, total):
            enough = seconds <= MAX_STEP_S and total <= PAPER_TOTAL_GIB * GIB
            values.append((f"{seconds:.3f} s in {total / GIB:.3g} GiB{_beside(record)}", enough))
    return values


def _beside(record: Record) -> str:
    """The disturbances of the seconds of ``record``, in parentheses; empty if there were none."""
    by = disturbed_seconds(record)
    return "" if by is None else f" (disturbed: {by})"


def _plan(record: Record) -> tuple[str, bool] | None:
    """The error of the plan of a case."""
    error = plan_error(record)
    return None if error is None else (f"{100 * error:+.1f} %", abs(error) <= MAX_PLAN_ERROR)


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
    Goal(
        text=f"update ≥ {MIN_UPDATE_FRACTION} of its roofline at the measured GEMM rate",
        values=functools.partial(_of_methods, measure=_update),
    ),
    Goal(
        text=f"Hydra-PPO ≤ {MAX_STEP_S} s a sample within {PAPER_TOTAL_GIB} GiB",
        values=functools.partial(_step, "hydra"),
    ),
    Goal(
        text=f"plan within {100 * MAX_PLAN_ERROR:.0f} % of the allocator",
        values=functools.partial(_of_methods, measure=_plan),
    ),
)
