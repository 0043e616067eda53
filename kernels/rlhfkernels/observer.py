"""What a step tells whoever watches it: where its phases begin and end, and what its tensors are for.

The default observer does nothing and costs nothing that a clock can see. A harness passes its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # records read ``PARTS`` without torch
    import torch

# The parts that memory is attributed to. ``activations`` and ``temporary`` are found by looking, the rest is declared.
PARTS = (
    "base",
    "adapters",
    "heads",
    "gradients",
    "optimizer",
    "kv_cache",
    "activations",
    "rollout",
    "temporary",
)


class Observer:
    """Watches a step. Every method may be overridden; none may change a tensor."""

    def enter_phase(self, name: str) -> None:
        """Called right before the first work of a stretch of phase ``name``. A phase may have many stretches."""

    def exit_phase(self, name: str) -> None:
        """Called right after the last work of that stretch was submitted; a device may still be busy with it."""

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
