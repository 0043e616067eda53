"""The form in C against plain arithmetic in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlhfkernels.ops.native.tape import Tape

pytestmark = pytest.mark.usefixtures("library")


@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("size", [1, 16, 24, 37, 131])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_norm(
    rows: int,
    size: int,
    centred: bool,
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
    if centred:
        wide = wide - wide.mean(-1, keepdim=True)
    expected = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    expected = expected * (1 if weight is None else weight.double()) + (0 if bias is None else bias.double())
    tape = Tape()
    tape.norm(x, weight, bias, out, eps=eps, centred=centred)
    tape.run()
    # The mean of large numbers is known to fewer digits than they are.
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=5e-5 if centred else 1e-5)
    assert_untouched_around(out)
