"""The gated activation of Llama's MLP (arXiv:2002.05202), silu(gate) · up, from one product that holds both.

Shapes: i = intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import silu

from rlhfkernels.ops.forms import takes_native, takes_triton
from rlhfkernels.ops.native import swiglu as native


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """The plain form.

    Args:
        gate_up: [..., 2 i]: gates, then ups.

    Returns:
        [..., i].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def swiglu(gate_up: torch.Tensor, *, kernels: str = "auto") -> torch.Tensor:
    """The fast form of ``swiglu_reference``, with the same gradients: it keeps its input only.

    Args:
        gate_up: [..., 2 i].
        kernels: as in ``takes_triton``.
    """
    form = _form(gate_up, kernels)
    if torch.is_grad_enabled() and gate_up.requires_grad:
        gated: torch.Tensor = _Swiglu.apply(gate_up, form)  # type: ignore[no-untyped-call]
        return gated
    return form.forward(gate_up)


class _Form(NamedTuple):
    """How it is computed.

    Attributes:
        forward: gates and ups to the result.
        backward: (gradient, gates and ups) to their gradient.
    """

    forward: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _form(gate_up: torch.Tensor, kernels: str) -> _Form:
    if takes_triton(gate_up, kernels):
        from rlhfkernels.ops.triton import swiglu as form

        return _Form(form.forward, form.backward)
    return _NATIVE if takes_native(kernels, gate_up) else _TORCH


def _forward(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate).mul_(up)


def _backward(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    torch.mul(grad, up, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_up, gate, grad_input=grad_gate)
    torch.mul(silu(gate), grad, out=grad_up)
    return grad_gate_up


_TORCH = _Form(_forward, _backward)
_NATIVE = _Form(native.forward, native.backward)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, form: _Form) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        ctx.form = form
        return form.forward(gate_up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.form.backward(grads[0], *ctx.saved_tensors), None
