"""The form in C of ``rlhfkernels.ops.rms_norm``."""

from __future__ import annotations

import torch

from rlhfkernels.ops.native.launch import launch
from rlhfkernels.ops.native.structures import RmsNorm


def forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised rows [..., d], and 1 / √(mean x² + eps) of each, [..., 1]."""
    x = x.contiguous()
    y, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
    d = x.shape[-1]
    rows = x.numel() // d
    launch("rms_norm", RmsNorm, rows, x=x, weight=weight, inverse=inverse, out=y, rows=rows, size=d, eps=eps)
    return y, inverse


def backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor, needed: tuple[bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of ``x`` [..., d] and of ``weight`` [d], those that are needed."""
    with_x, with_weight = needed
    x, d = x.contiguous(), x.shape[-1]
    grad_x = grad_weight = None
    if with_weight:
        grad_weight = (x * inverse).mul_(grad).flatten(0, -2).sum(0)
    if with_x:
        grad_x = torch.empty_like(x)
        rows = x.numel() // d
        given = {"x": x, "weight": weight, "inverse": inverse, "grad": grad.contiguous(), "grad_x": grad_x}
        launch("rms_norm_backward", RmsNorm, rows, **given, rows=rows, size=d)
    return grad_x, grad_weight
