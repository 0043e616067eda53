"""Guarded memory for tests of the ops in C."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

# Elements on each side of a tensor.
GUARD = 64


@pytest.fixture
def placed() -> Callable[[torch.Tensor], torch.Tensor]:
    """Copies a tensor into memory with NaN on both sides, which an op must neither read nor change."""

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        memory = torch.full((tensor.numel() + 2 * GUARD,), math.nan)
        memory[GUARD:-GUARD] = tensor.flatten()
        return memory[GUARD:-GUARD].view(tensor.shape)

    return placed


@pytest.fixture
def draw(placed: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Draws guarded random tensors, the same in every test."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: placed(torch.randn(shape, generator=generator))


@pytest.fixture
def blank(placed: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Makes guarded tensors of NaN: outputs that must not be read before they are written."""
    return lambda *shape: placed(torch.full(shape, math.nan))


@pytest.fixture
def assert_untouched_around() -> Callable[..., None]:
    """Fails if an op has written outside guarded tensors."""

    def check(*tensors: torch.Tensor) -> None:
        for tensor in tensors:
            memory = torch.empty(0).set_(tensor.untyped_storage())
            assert memory[:GUARD].isnan().all()
            assert memory[-GUARD:].isnan().all()

    return check
