"""The form in C of ``rlhfkernels.ops.swiglu``."""

from __future__ import annotations

import torch

from rlhfkernels.ops.native.launch import launch
from rlhfkernels.ops.native.structures import Swiglu


def forward(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, [..., i], of gates and ups [..., 2 i]."""
    gate_up, i = gate_up.contiguous(), gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], i)
    rows = out.numel() // i
    launch("swiglu", Swiglu, rows, gate_up=gate_up, out=out, rows=rows, size=i)
    return out


def backward(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """The gradient of gates and ups, [..., 2 i]."""
    gate_up, i = gate_up.contiguous(), gate_up.shape[-1] // 2
    grad_gate_up = torch.empty_like(gate_up)
    rows = gate_up.numel() // (2 * i)
    given = {"gate_up": gate_up, "grad": grad.contiguous(), "grad_gate_up": grad_gate_up}
    launch("swiglu_backward", Swiglu, rows, **given, rows=rows, size=i)
    return grad_gate_up
