"""SwiGLU (arXiv:2002.05202), silu(gate) · up, of one tensor that holds both.

Shapes: i = intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import silu

from rlhfkernels.ops.dispatch import takes_native, takes_triton
from rlhfkernels.ops.native import swiglu as native


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """Computes silu(gate) · up.

    Args:
        gate_up: [..., 2 i]: gates, then ups.

    Returns:
        [..., i].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def swiglu(gate_up: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Computes ``swiglu_reference`` and its gradient; keeps its input only.

    Args:
        gate_up: [..., 2 i].
        backend: as in ``takes_triton`` and ``takes_native``.
    """
    kernels = _kernels(gate_up, backend)
    if torch.is_grad_enabled() and gate_up.requires_grad:
        y: torch.Tensor = _Swiglu.apply(gate_up, kernels)  # type: ignore[no-untyped-call]
        return y
    return kernels.forward(gate_up)


class _Kernels(NamedTuple):
    """Functions of a backend.

    Attributes:
        forward: gates and ups to the result.
        backward: (gradient, gates and ups) to the gradient of gates and ups.
    """

    forward: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _kernels(gate_up: torch.Tensor, backend: str) -> _Kernels:
    if takes_triton(gate_up, backend):
        from rlhfkernels.ops.triton import swiglu as triton

        return _Kernels(triton.forward, triton.backward)
    return _NATIVE if takes_native(backend, gate_up) else _TORCH


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


_TORCH = _Kernels(_forward, _backward)
_NATIVE = _Kernels(native.forward, native.backward)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, kernels: _Kernels) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        ctx.kernels = kernels
        return kernels.forward(gate_up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.kernels.backward(grads[0], *ctx.saved_tensors), None
