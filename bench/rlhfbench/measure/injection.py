"""Faults put into a step on purpose, so that a gate can be tested: a slower phase, a tensor held too long."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch

from rlhfkernels.observer import Observer


class InjectedStep:
    """A step with a fault. All but ``run`` is the inner step's.

    Args:
        inner: The step.
        device: Its device.
        phase: The phase that is slowed down; ``None`` for none.
        share: Of every stretch of that phase, spent waiting busily at its end.
        held_bytes: Size of a tensor that is held from the beginning of a step to its end.
    """

    def __init__(
        self, inner: Any, device: str, *, phase: str | None = None, share: float = 0.0, held_bytes: int = 0
    ) -> None:
        self._inner, self._device = inner, device
        self._phase, self._share, self._held_bytes = phase, share, held_bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def run(self, observer: Observer) -> Any:
        """Runs the inner step with the fault."""
        held = torch.ones(self._held_bytes // 4, device=self._device) if self._held_bytes else None
        stats = self._inner.run(_Slower(observer, self._phase, self._share))
        del held
        return stats


class _Slower(Observer):
    """Passes on all calls, and waits at the end of a phase before the others learn of it."""

    def __init__(self, inner: Observer, phase: str | None, share: float) -> None:
        self._inner, self._phase, self._share = inner, phase, share
        self._entered_s = 0.0

    def enter_phase(self, name: str) -> None:
        """Passes the call on."""
        self._inner.enter_phase(name)
        self._entered_s = time.perf_counter()

    def exit_phase(self, name: str) -> None:
        """Waits, then passes the call on."""
        if name == self._phase:
            now_s = time.perf_counter()
            end_s = now_s + self._share * (now_s - self._entered_s)
            while time.perf_counter() < end_s:
                pass
        self._inner.exit_phase(name)

    def tag(self, part: str, tensors: Iterable[torch.Tensor]) -> None:
        """Passes the call on."""
        self._inner.tag(part, tensors)
