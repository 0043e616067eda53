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
        share: Of the last stretch of that phase, spent waiting busily at the beginning of the next.
        held_bytes: Size of a tensor that is held from the beginning of a step to its end.
    """

    def __init__(
        self, inner: Any, device: str, *, phase: str | None = None, share: float = 0.0, held_bytes: int = 0
    ) -> None:
        self._inner, self._device = inner, device
        self._phase, self._share, self._held_bytes = phase, share, held_bytes
        self._stretch_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def run(self, observer: Observer) -> Any:
        """Runs the inner step with the fault."""
        held = torch.ones(self._held_bytes // 4, device=self._device) if self._held_bytes else None
        slower = _Slower(observer, self._phase, self._share, self._stretch_s)
        stats = self._inner.run(slower)
        self._stretch_s = slower.stretch_s
        del held
        return stats


class _Slower(Observer):
    """Passes on all calls, and waits at the beginning of a phase after the others have learnt of it.

    It waits before the work and not after it: a busy wait leaves the caches cold for what follows. One of 4 ms at the
    end of ``update`` made the 2 ms of ``optimize`` behind it slower by 5 %, at the beginning of ``update`` by 0.2 %.

    Attributes:
        stretch_s: Seconds that the last stretch of the phase took without its wait.
    """

    def __init__(self, inner: Observer, phase: str | None, share: float, stretch_s: float) -> None:
        self._inner, self._phase, self._share = inner, phase, share
        self.stretch_s = stretch_s
        self._began_s = 0.0

    def enter_phase(self, name: str) -> None:
        """Passes the call on, then waits."""
        self._inner.enter_phase(name)
        if name == self._phase:
            self._began_s = time.perf_counter() + self._share * self.stretch_s
            while time.perf_counter() < self._began_s:
                pass

    def exit_phase(self, name: str) -> None:
        """Passes the call on."""
        if name == self._phase:
            self.stretch_s = time.perf_counter() - self._began_s
        self._inner.exit_phase(name)

    def tag(self, part: str, tensors: Iterable[torch.Tensor]) -> None:
        """Passes the call on."""
        self._inner.tag(part, tensors)
