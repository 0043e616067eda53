"""Memory for the ops in C to be tested on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

# On each side of what an op reads or writes.
ROOM = 64


@pytest.fixture
def placed() -> Callable[[torch.Tensor], torch.Tensor]:
    """Copies a tensor to where NaN lies on both sides of it, which must not show and must not change."""

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        room = torch.full((tensor.numel() + 2 * ROOM,), math.nan)
        room[ROOM:-ROOM] = tensor.flatten()
        return room[ROOM:-ROOM].view(tensor.shape)

    return placed


@pytest.fixture
def draw(placed: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Random numbers of a shape, placed likewise; the same ones in the same order in every test."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: placed(torch.randn(shape, generator=generator))


@pytest.fixture
def blank(placed: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """NaN of a shape, placed likewise: memory that is not to be read before it is written."""
    return lambda *shape: placed(torch.full(shape, math.nan))


@pytest.fixture
def assert_untouched_around() -> Callable[..., None]:
    """Fails if anything was written beside tensors that were placed."""

    def check(*tensors: torch.Tensor) -> None:
        for tensor in tensors:
            room = torch.empty(0).set_(tensor.untyped_storage())
            assert room[:ROOM].isnan().all()
            assert room[-ROOM:].isnan().all()

    return check
