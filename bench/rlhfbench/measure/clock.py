"""The clock of the timing pass: seconds by phase, and nothing else."""

from __future__ import annotations

import time

import torch

from rlhfkernels.observer import Observer


class StepClock(Observer):
    """Adds up the time between the boundaries of each phase's stretches.

    On a CUDA device it waits at each boundary until the device is done; within a stretch it does nothing. A stretch
    inside another phase's stretch is counted once, as the inner phase's.

    Attributes:
        last_phase: the phase that was entered last, ``None`` before the first.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._device = torch.device(device)
        self._waits = self._device.type == "cuda"
        self._spent_ns: dict[str, int] = {}
        self._running: list[str] = []
        self._mark_ns = 0
        self.last_phase: str | None = None

    def enter_phase(self, name: str) -> None:
        """Starts ``name``'s stretch."""
        self._turn()
        self._running.append(name)
        self.last_phase = name

    def exit_phase(self, name: str) -> None:
        """Ends it."""
        self._turn()
        self._running.pop()

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last ``take``, in the order in which the phases first came."""
        spent, self._spent_ns = self._spent_ns, {}
        return {name: ns * 1e-9 for name, ns in spent.items()}

    def _turn(self) -> None:
        """Gives the time since the last boundary to the phase that was running, if one was."""
        if self._waits:
            torch.cuda.synchronize(self._device)
        now_ns = time.perf_counter_ns()
        if self._running:
            name = self._running[-1]
            self._spent_ns[name] = self._spent_ns.get(name, 0) + now_ns - self._mark_ns
        self._mark_ns = now_ns
