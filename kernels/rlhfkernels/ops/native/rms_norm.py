"""RMS norm in C, forward and backward."""

from __future__ import annotations

import torch

from rlhfkernels.ops.native.launch import check_shape, launch
from rlhfkernels.ops.native.structures import Norm


def forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the normalized rows [..., d], and 1 / √(mean x² + eps), [..., 1]."""
    x, d = x.contiguous(), x.shape[-1]
    check_shape("weight", weight, d)
    y, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
    rows = x.numel() // d
    launch("norm", Norm, rows, x=x, weight=weight, inverse=inverse, out=y, rows=rows, size=d, eps=eps)
    return y, inverse


def backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor, needed: tuple[bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Returns the gradients of ``x`` [..., d] and of ``weight`` [d], ``None`` where not needed."""
    x_needed, weight_needed = needed
    x, d = x.contiguous(), x.shape[-1]
    grad_x = grad_weight = None
    if weight_needed:
        grad_weight = (x * inverse).mul_(grad).flatten(0, -2).sum(0)
    if x_needed:
        grad_x = torch.empty_like(x)
        rows = x.numel() // d
        tensors = {"x": x, "weight": weight, "inverse": inverse, "grad": grad.contiguous(), "grad_x": grad_x}
        launch("rms_norm_backward", Norm, rows, **tensors, rows=rows, size=d)
    return grad_x, grad_weight
