"""Norms in C against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlhfkernels.ops.native.program import Program

pytestmark = pytest.mark.usefixtures("library")


@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("size", [1, 16, 24, 37, 131])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_norm(
    rows: int,
    size: int,
    centered: bool,
    with_weight: bool,
    with_bias: bool,
    scale: float,
    draw: Callable[..., torch.Tensor],
    blank: Callable[..., torch.Tensor],
    placed: Callable[..., torch.Tensor],
    assert_untouched_around: Callable[..., None],
) -> None:
    x, out, eps = placed(scale * (draw(rows, size) + 3)), blank(rows, size), 1e-2
    weight, bias = draw(size) if with_weight else None, draw(size) if with_bias else None
    wide = x.double()
    if centered:
        wide = wide - wide.mean(-1, keepdim=True)
    expected = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    expected = expected * (1 if weight is None else weight.double()) + (0 if bias is None else bias.double())
    program = Program()
    program.norm(x, weight, bias, out, eps=eps, centered=centered)
    program.run()
    # Subtracting the mean of large elements cancels digits.
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=5e-5 if centered else 1e-5)
    assert_untouched_around(out)
