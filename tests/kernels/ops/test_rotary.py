from __future__ import annotations

import pytest
import torch

from rlhfkernels.ops.qkv_layout import RotaryPart
from rlhfkernels.ops.rotary import make_signed_sin, rotary_, rotary_reference

T, E = 5, 8


def tables(rows: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(rows, T, size // 2, dtype=torch.float64).repeat(1, 1, 2)
    return angles.cos(), make_signed_sin(angles.sin())


@pytest.mark.parametrize("part", [RotaryPart(1, 4, 3), RotaryPart(2, 3, 2)], ids=str)
@pytest.mark.parametrize("size", [E, 4])
@pytest.mark.parametrize("rows", [1, 2])
def test_values_and_gradients_equal_the_reference(part: RotaryPart, size: int, rows: int) -> None:
    torch.manual_seed(0)
    cos, signed_sin = tables(rows, size)
    base = torch.randn(2 * T, part.blocks * part.groups * E, dtype=torch.float64)
    weights = torch.randn_like(base)
    results = []
    for function in (rotary_, rotary_reference):
        leaf = base.clone().requires_grad_()
        y = function(leaf * 1.0, cos, signed_sin, part)
        (y * weights).sum().backward()
        results.append((y.detach(), leaf.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_the_reference_multiplies_complex_numbers_by_their_phases() -> None:
    """Elements i and i + s / 2 of a rotated head are one complex number."""
    torch.manual_seed(0)
    part, size = RotaryPart(2, 3, 2), 6
    angles = torch.rand(1, T, size // 2, dtype=torch.float64)
    x = torch.randn(T, 6 * E, dtype=torch.float64)
    cos, sin = (table.repeat(1, 1, 2) for table in (angles.cos(), angles.sin()))
    expected = x.clone().view(T, 2, 3, E)
    heads = expected[:, :, :2]
    rotated = torch.complex(heads[..., :3], heads[..., 3:6]) * torch.exp(1j * angles[0])[:, None, None]
    heads[..., :3], heads[..., 3:6] = rotated.real, rotated.imag
    torch.testing.assert_close(rotary_reference(x, cos, make_signed_sin(sin), part), expected.view(T, -1))


def test_it_works_in_place_and_keeps_only_the_tables() -> None:
    cos, signed_sin = tables(1, E)
    saved: list[torch.Tensor] = []
    leaf = torch.randn(T, 2 * E, dtype=torch.float64, requires_grad=True)
    x = leaf * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = rotary_(x, cos, signed_sin, RotaryPart(1, 2, 1))
    assert y.data_ptr() == x.data_ptr()
    assert all(t.shape == cos.shape for t in saved)


def test_the_backward_does_not_change_the_incoming_gradient() -> None:
    cos, signed_sin = tables(1, E)
    x = torch.randn(T, 2 * E, dtype=torch.float64, requires_grad=True) * 1.0
    y = rotary_(x, cos, signed_sin, RotaryPart(1, 2, 1))
    grad = torch.randn_like(y)
    before = grad.clone()
    torch.autograd.backward(y, grad)
    assert torch.equal(grad, before)
