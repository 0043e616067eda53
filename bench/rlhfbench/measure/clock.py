"""The clock of timed steps: seconds by phase."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from rlhfkernels.observer import Observer


class StepClock(Observer):
    """Sums the wall time of each phase.

    On a CUDA device it synchronizes at phase boundaries only, so kernels within a phase stay asynchronous. Time inside
    a nested phase counts for the inner phase alone.

    Args:
        device: Device of the step.
        on_phase: Called with the name of each phase as it begins, inside its time.

    Attributes:
        last_phase: The phase entered last; ``None`` before the first.
    """

    def __init__(self, device: str | torch.device = "cpu", on_phase: Callable[[str], object] | None = None) -> None:
        self._on_phase = on_phase
        self._device = torch.device(device)
        self._synchronizes = self._device.type == "cuda"
        self._spent_ns: dict[str, int] = {}
        self._running: list[str] = []
        self._mark_ns = 0
        self.last_phase: str | None = None

    def enter_phase(self, name: str) -> None:
        """Starts a stretch of phase ``name``."""
        self._switch()
        self._running.append(name)
        self.last_phase = name
        if self._on_phase is not None:
            self._on_phase(name)

    def exit_phase(self, name: str) -> None:
        """Ends the stretch."""
        self._switch()
        self._running.pop()

    def take(self) -> dict[str, float]:
        """Returns seconds by phase since the last ``take``, in the order of first entry, and starts again at 0."""
        spent, self._spent_ns = self._spent_ns, {}
        return {name: ns * 1e-9 for name, ns in spent.items()}

    def _switch(self) -> None:
        """Adds the time since the last boundary to the phase that was running, if any."""
        if self._synchronizes:
            torch.cuda.synchronize(self._device)
        now_ns = time.perf_counter_ns()
        if self._running:
            name = self._running[-1]
            self._spent_ns[name] = self._spent_ns.get(name, 0) + now_ns - self._mark_ns
        self._mark_ns = now_ns
