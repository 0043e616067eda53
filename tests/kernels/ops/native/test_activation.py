"""Activations in C against their formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from rlhfkernels.ops.native.program import ACTIVATIONS, Program

pytestmark = pytest.mark.usefixtures("library")


IN_FLOAT64: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu_tanh": lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: x / 2 * torch.erfc(-x / math.sqrt(2)),
    "relu": lambda x: x.clamp(min=0),
}
LARGE = torch.tensor([0.0, 1e-30, 5.0, 20.0, 87.0, 88.5, 200.0, 1e4, 1e12])


def test_every_activation_is_tested() -> None:
    assert set(IN_FLOAT64) == set(ACTIVATIONS)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [9, 16, 37])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation(
    kind: str,
    rows: int,
    size: int,
    gated: bool,
    draw: Callable[..., torch.Tensor],
    blank: Callable[..., torch.Tensor],
    assert_untouched_around: Callable[..., None],
) -> None:
    x, out = draw(rows, (1 + gated) * size), blank(rows, size)
    x.mul_(3)
    x[0, :9] = LARGE
    x[-1, :9] = -LARGE if rows > 1 else LARGE
    expected = IN_FLOAT64[kind](x[:, :size].double()) * (x[:, size:].double() if gated else 1)
    program = Program()
    program.activation(x, out, kind=kind, gated=gated)
    program.run()
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=2e-6)
    assert_untouched_around(out)


IN_TORCH = {
    "silu": nn.functional.silu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_infinities_and_nan_equal_torchs(
    kind: str, blank: Callable[..., torch.Tensor], placed: Callable[..., torch.Tensor]
) -> None:
    x = placed(torch.tensor([[math.inf, -math.inf, math.nan, 1e38, -1e38, 0.0, -0.0]]))
    out = blank(*x.shape)
    program = Program()
    program.activation(x, out, kind=kind, gated=False)
    program.run()
    torch.testing.assert_close(out, IN_TORCH[kind](x.double()).float(), equal_nan=True)
