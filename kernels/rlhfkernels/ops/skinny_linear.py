"""A product of a few rows with a large weight, as every step of decoding asks for: bound by reading the weight once.

On a processor the plain ``x Wᵀ`` of two to eight rows runs several times below the memory's bandwidth, and a single row
no better; ``W xᵀ`` with the rows untouched in memory runs at it. So the result is handed out transposed.

Shapes: b = rows, i = inputs, o = outputs.
"""

from __future__ import annotations

import torch
from torch import nn


def skinny_linear_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The plain form: ``(x Wᵀ)ᵀ``.

    Args:
        x: [b, i].
        weight: [o, i].

    Returns:
        [o, b].
    """
    return nn.functional.linear(x, weight).t()


def skinny_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The form for few rows; arguments and result as ``skinny_linear_reference``, no gradient."""
    if not x.is_cpu:
        return skinny_linear_reference(x, weight)
    if x.shape[0] == 1:
        # One row goes through a matrix-vector product that is slower than a matrix product of two.
        return torch.mm(weight, x.expand(2, -1).contiguous().t())[:, :1]
    return torch.mm(weight, x.t())
