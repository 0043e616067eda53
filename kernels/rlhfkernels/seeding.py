"""Random states that are borrowed and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Draws inside come from ``seed``; the caller's random states, on the CPU and on ``device``, do not move."""
    on_cuda = device.type == "cuda" and torch.cuda.is_available()
    with torch.random.fork_rng([device] if on_cuda else []):
        torch.manual_seed(seed)
        yield
