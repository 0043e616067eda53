"""Weights that a rank gathers while their module runs: which are whole when, and what that takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rlhfbench.measure.ledger import Ledger
from rlhfbench.planning.gathering import DividedWeights, deepspeed_linear
from rlhfkernels.parallel.strategies import BaseModule

FLOAT = 4


def whole(module: nn.Module) -> list[str]:
    return [name for name, weight in module.named_parameters() if weight.numel()]


class Notes(nn.Module):
    """Passes its input on, and notes what is whole in the forward and in the backward."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self._of = [of]  # no submodule
        self.forwards: list[list[str]] = []
        self.backwards: list[list[str]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards.append(whole(self._of[0]))
        x = x.clone()
        if x.requires_grad:
            x.register_hook(lambda gradient: self.backwards.append(whole(self._of[0])))
        return x


class Around(nn.Module):
    """A linear layer between notes that lie inside its own scope."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x * self.weight)
        return y


def divided(*layers: nn.Module, world_size: int = 2, tag: Any = lambda part, tensors: None) -> tuple[Any, Any]:
    base = BaseModule(nn.Sequential(*layers), [])
    return base, DividedWeights(base, world_size, tag)


def test_a_module_has_its_weights_while_it_runs() -> None:
    notes = Notes(trunk := nn.Sequential())
    layers = [Around(notes), nn.Linear(3, 5, bias=False), nn.Linear(5, 2)]
    for layer in layers:
        trunk.append(layer)
    base = BaseModule(trunk, [])
    weights = DividedWeights(base, 2, lambda part, tensors: None)
    assert [part.numel() for part in weights.parts.values()] == [2, 8, 5, 1]
    x = torch.ones(4, 3, requires_grad=True)
    with deepspeed_linear():
        loss = base(lambda: base.trunk(x)).sum()
        assert (notes.forwards, whole(base)) == ([["0.weight"]], [])
        loss.backward()
    assert notes.backwards == [["0.weight"]]
    assert whole(base) == []
    assert [tuple(p.grad.shape) for p in base.parameters() if p.grad is not None] == [(3,), (5, 3), (2, 5), (2,)]


def test_what_has_no_end_in_the_backward_is_let_go_with_it() -> None:
    base, weights = divided(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    with deepspeed_linear():
        base(lambda: base.trunk(torch.ones(4, 3))).sum().backward()
    assert whole(base.trunk) == ["0.weight"]  # its input needs no gradient
    weights.end_backward()
    assert whole(base) == []


def test_a_weight_that_another_module_reads_is_there() -> None:
    base, weights = divided(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    read = base.trunk[1].weight
    assert base(lambda: base.trunk[1].weight.shape) == (3, 3)  # gathered for the base, which runs
    weights.reads(base, [read])
    assert base(lambda: (whole(base.trunk), read.shape)) == (["1.weight"], (3, 3))
    with weights.whole():
        base(lambda: base.trunk(torch.ones(4, 3)))
        assert whole(base.trunk) == ["0.weight", "1.weight"]
    assert whole(base) == []


@pytest.mark.parametrize(
    ("bias", "world_size", "gathered", "copied"),
    # Parts are rounded up, and so is what they are gathered into.
    [(False, 2, 16, 0), (False, 1, 0, 0), (True, 2, 16 + 4, 15 + 3), (True, 4, 16 + 4, 15 + 3), (True, 1, 0, 0)],
)
def test_several_weights_are_copied_out_of_one_buffer(bias: bool, world_size: int, gathered: int, copied: int) -> None:
    ledger = Ledger("cpu")
    base, weights = divided(nn.Linear(5, 3, bias=bias), world_size=world_size, tag=ledger.tag)
    with ledger:
        ledger.tag("base", weights.parts.values())
        with ledger.phase("read"):
            weights.reads(base, base.trunk[0].parameters())
            base(lambda: None)
    peak = ledger.peaks["read"].parts
    assert (peak["gathered"], peak["temporary"]) == (gathered * FLOAT, copied * FLOAT)
    assert ledger.parts["gathered"] == 0
