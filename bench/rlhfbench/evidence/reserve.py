"""The reserve of a device, fitted from records that hold a plan beside the allocator's and the driver's figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from rlhfbench.records.derived import at
from rlhfbench.records.file import Record


@dataclasses.dataclass(frozen=True, slots=True)
class Reserve:
    """Memory that tensors cannot use, as ``Accelerator.reserve_bytes`` models it.

    Attributes:
        context_bytes: what the driver counts beyond the allocator, and library workspaces.
        fragmentation: what the allocator reserves beyond the planned bytes, as a share of these.
    """

    context_bytes: int
    fragmentation: float

    def bytes_of(self, memory_bytes: int) -> int:
        """Returns the reserve of a device of ``memory_bytes``."""
        return int(self.context_bytes + self.fragmentation * memory_bytes)


def fit_reserve(records: Iterable[Record]) -> Reserve | None:
    """Returns the smallest reserve that covers all ``records``; ``None`` if none has all four figures."""
    contexts: list[int] = []
    shares: list[float] = []
    for record in records:
        names = ("driver_peak_bytes", "allocator_reserved_bytes", "workspace_bytes")
        driver, reserved, workspaces = (at(record, f"memory.views.{name}") for name in names)
        planned = at(record, "plan.total_bytes")
        if None not in (driver, reserved, workspaces) and planned:
            contexts.append(driver - reserved + workspaces)
            shares.append((reserved - workspaces) / planned - 1)
    return Reserve(max(contexts), max(0.0, *shares)) if contexts else None
