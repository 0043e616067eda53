from __future__ import annotations

import pytest
import torch

from rlhfkernels.ops.heads import RotaryPart
from rlhfkernels.ops.rotary import rotary_, rotary_reference, signed

T, E = 5, 8


def tables(rows: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(rows, T, size // 2, dtype=torch.float64).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


def by_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, part: RotaryPart) -> torch.Tensor:
    """Every group of its own, the ones that are not rotated copied."""
    grouped = x.view(-1, T, part.blocks * part.groups, E)
    turned = []
    for i in range(part.blocks * part.groups):
        group, size = grouped[:, :, i], cos.shape[-1]
        if i % part.groups < part.rotated:
            group = torch.cat([rotary_reference(group[..., :size], cos, sin), group[..., size:]], -1)
        turned.append(group)
    return torch.stack(turned, 2).view(x.shape)


@pytest.mark.parametrize("part", [RotaryPart(1, 4, 3), RotaryPart(2, 3, 2)], ids=str)
@pytest.mark.parametrize("size", [E, 4])
@pytest.mark.parametrize("rows", [1, 2])
def test_values_and_gradients_equal_the_reference(part: RotaryPart, size: int, rows: int) -> None:
    torch.manual_seed(0)
    cos, sin = tables(rows, size)
    base = torch.randn(2 * T, part.blocks * part.groups * E, dtype=torch.float64)
    weights = torch.randn_like(base)
    found = []
    for fast in (True, False):
        leaf = base.clone().requires_grad_()
        x = leaf * 1.0
        y = rotary_(x, cos, signed(sin), part) if fast else by_reference(x, cos, sin, part)
        (y * weights).sum().backward()
        found.append((y.detach(), leaf.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_it_works_in_place_and_keeps_only_the_tables() -> None:
    cos, sin = tables(1, E)
    kept: list[torch.Tensor] = []
    leaf = torch.randn(T, 2 * E, dtype=torch.float64, requires_grad=True)
    x = leaf * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = rotary_(x, cos, signed(sin), RotaryPart(1, 2, 1))
    assert y.data_ptr() == x.data_ptr()
    assert all(t.shape == cos.shape for t in kept)


def test_the_gradient_that_comes_in_is_left_as_it_was() -> None:
    cos, sin = tables(1, E)
    x = torch.randn(T, 2 * E, dtype=torch.float64, requires_grad=True) * 1.0
    y = rotary_(x, cos, signed(sin), RotaryPart(1, 2, 1))
    grad = torch.randn_like(y)
    before = grad.clone()
    torch.autograd.backward(y, grad)
    assert torch.equal(grad, before)
