"""SwiGLU in C, forward and backward: the gated SiLU of the activations."""

from __future__ import annotations

import torch

from rlhfkernels.ops.native.launch import launch
from rlhfkernels.ops.native.program import ACTIVATIONS
from rlhfkernels.ops.native.structures import Activation

_SILU = ACTIVATIONS.index("silu")


def forward(gate_up: torch.Tensor) -> torch.Tensor:
    """Returns silu(gate) · up, [..., i], of gates and ups [..., 2 i]."""
    gate_up, i = gate_up.contiguous(), gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], i)
    rows = out.numel() // i
    launch("activation", Activation, rows, x=gate_up, out=out, rows=rows, size=i, gated=1, kind=_SILU)
    return out


def backward(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of gates and ups, [..., 2 i]."""
    gate_up, i = gate_up.contiguous(), gate_up.shape[-1] // 2
    grad_gate_up = torch.empty_like(gate_up)
    rows = gate_up.numel() // (2 * i)
    tensors = {"x": gate_up, "grad": grad.contiguous(), "grad_x": grad_gate_up}
    launch("swiglu_backward", Activation, rows, **tensors, rows=rows, size=i)
    return grad_gate_up
