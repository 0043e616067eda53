"""Observers of a step: notified when its phases begin and end, and which memory part its tensors belong to.

The default observer does nothing, so that a timed step carries no instrument.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # records read ``PARTS`` without torch
    import torch

# The parts of memory. The ledger finds ``activations`` (tensors that autograd saved), ``gathered`` (weights that other
# ranks hold), ``buckets`` (other memory of collectives) and ``temporary`` (the rest); the others are declared with
# ``Observer.tag``.
PARTS = (
    "base",
    "adapters",
    "heads",
    "gradients",
    "optimizer",
    "kv_cache",
    "activations",
    "rollout",
    "gathered",
    "buckets",
    "temporary",
)


class Observer:
    """Receives the notifications of a step. Subclasses override methods; none may change a tensor."""

    def enter_phase(self, name: str) -> None:
        """Called before the first op of a stretch of phase ``name``. A phase may have several stretches."""

    def exit_phase(self, name: str) -> None:
        """Called after the last op of that stretch was submitted; a device may still be executing it."""

    def tag(self, part: str, tensors: Iterable[torch.Tensor]) -> None:
        """Declares that the storages of ``tensors`` belong to ``part`` (one of ``PARTS``) for as long as they live."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A stretch of phase ``name``."""
        self.enter_phase(name)
        try:
            yield
        finally:
            self.exit_phase(name)
