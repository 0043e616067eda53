"""The announcement of phases, to whoever waits for a measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from rlhfkernels.observer import Observer

Notify = Callable[[str], None]


class Announcer(Observer):
    """Announces each phase as it begins, and passes every call on to other observers, in their order."""

    def __init__(self, notify: Notify, *inner: Observer) -> None:
        self._notify = notify
        self._inner = inner
        self._last: str | None = None

    def enter_phase(self, name: str) -> None:
        """Announces the phase, once for consecutive stretches."""
        if name != self._last:
            self._last = name
            self._notify(f"phase:{name}")
        for observer in self._inner:
            observer.enter_phase(name)

    def exit_phase(self, name: str) -> None:
        """Passes the call on."""
        for observer in self._inner:
            observer.exit_phase(name)

    def tag(self, part: str, tensors: Iterable[torch.Tensor]) -> None:
        """Passes the call on."""
        tensors = list(tensors)
        for observer in self._inner:
            observer.tag(part, tensors)
