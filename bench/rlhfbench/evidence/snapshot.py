"""Views of a step that only CUDA has: waits for the device, and the allocator's history.

Not yet run on a GPU.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from rlhfbench.measure.allocator import allocator_history, keeps_history
from rlhfkernels.config.case import Case
from rlhfkernels.observer import Observer
from rlhfkernels.training.step import build_step

_MAX_PLACES = 20


class _Phases(Observer):
    """Keeps the phase that runs."""

    name: str | None = None

    def enter_phase(self, name: str) -> None:
        """Keeps the name."""
        self.name = name

    def exit_phase(self, name: str) -> None:
        """Forgets it."""
        self.name = None


def watch_step(case: Case, path: Path) -> dict[str, Any]:
    """Runs one step of ``case`` on CUDA, after one that compiles and allocates.

    Args:
        case: the case.
        path: receives the snapshot of torch's own allocator, for pytorch.org/memory_viz.

    Returns:
        ``num_waits``: synchronizations inside phases, as ``torch.cuda.set_sync_debug_mode`` warns of them; ``waits``:
        phase and place of the first of them; ``allocator_peak_bytes``.
    """
    step = build_step(case)
    step.run()
    torch.cuda.reset_peak_memory_stats(case.device)
    phases = _Phases()
    waits: list[str] = []

    def note(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        if phases.name is not None and "synchroniz" in str(message):
            waits.append(f"{phases.name}: {filename.rpartition('/rlhfkernels/')[2]}:{lineno}")

    history = allocator_history(path) if keeps_history() else nullcontext()
    with history, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step.run(phases)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {
        "num_waits": len(waits),
        "waits": list(dict.fromkeys(waits))[:_MAX_PLACES],
        "allocator_peak_bytes": torch.cuda.max_memory_allocated(case.device),
    }
