"""Projections whose weights a library moves, or gathers anew for every pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlhfkernels import CaseError
from rlhfkernels.engine.fast.projections import GatheredProjection, Projection
from rlhfkernels.parallel.strategies import by_storage


@pytest.fixture
def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(4, outputs, dtype=torch.float64) for outputs in (3, 2)]


def expected(layers: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    return torch.cat([layer(x) for layer in layers], -1)


def test_weights_that_were_flattened_in_the_order_of_their_storages_are_followed(layers: list[nn.Module]) -> None:
    projection = Projection(layers)
    parameters = by_storage([layer.bias for layer in layers] + [layer.weight for layer in reversed(layers)])
    assert [tuple(p.shape) for p in parameters] == [(3,), (2,), (3, 4), (2, 4)]
    flat, start = torch.randn(25, dtype=torch.float64), 0
    for parameter in parameters:
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    projection.follow_weights()
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(projection.forward(x, None, "torch"), expected(layers, x))


def test_weights_that_were_moved_apart_are_refused(layers: list[nn.Module]) -> None:
    projection = Projection(layers)
    layers[1].weight.data = layers[1].weight.data.clone()  # type: ignore[union-attr, operator]
    with pytest.raises(CaseError, match=r"engine\.trunk is 'fast': .* so it must be plain\."):
        projection.follow_weights()


def test_gathered_weights_are_found_again_in_the_backward(layers: list[nn.Module]) -> None:
    projection = GatheredProjection(layers)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(expected(layers, x).square().sum(), x)
    y = projection.forward(x, None, "torch")
    torch.testing.assert_close(y, expected(layers, x))
    for layer in layers:  # what was gathered for the forward is let go, and gathered anew
        gathered = layer.weight.data
        layer.weight.data = gathered.clone()  # type: ignore[assignment, operator]
        gathered.zero_()  # type: ignore[operator]
    (found,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(found, wanted)
