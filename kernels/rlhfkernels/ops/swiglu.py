"""The gated activation of Llama's MLP (arXiv:2002.05202), silu(gate) · up, from one product that holds both.

Shapes: i = intermediate size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import silu


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """The plain form.

    Args:
        gate_up: [..., 2 i]: gates, then ups.

    Returns:
        [..., i].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """The fast form of ``swiglu_reference``, with the same gradients: it keeps its input only."""
    if torch.is_grad_enabled() and gate_up.requires_grad:
        gated: torch.Tensor = _Swiglu.apply(gate_up)  # type: ignore[no-untyped-call]
        return gated
    return _gated(gate_up)


def _gated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate).mul_(up)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        return _gated(gate_up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (gate_up,) = ctx.saved_tensors
        (grad,) = grads
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, up, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_up, gate, grad_input=grad_gate)
        torch.mul(silu(gate), grad, out=grad_up)
        return grad_gate_up
