"""Matmul of many rows, as every layer of a full-length forward pass needs.

Torch and the C backend compute it; on the CPU the one that was faster on this machine runs, see
``rlhfkernels.ops.native.choice``.

Shapes: m = rows, k = summed over, n = columns, r = rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlhfkernels.ops.blocked_matmul import blocked_matmul
from rlhfkernels.ops.dispatch import takes_native
from rlhfkernels.ops.native import matmul as native


class LowRankTerm(NamedTuple):
    """A product of low rank that is added to a matmul, as by an adapter.

    Attributes:
        left: [m, r].
        right: [r, n].
        scale: multiplies it.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float


def matmul_reference(
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    scale: float = 1.0,
    accumulate: bool = False,
    low_rank: LowRankTerm | None = None,
) -> torch.Tensor:
    """Computes ``scale · (left @ right + low_rank.scale · low_rank.left @ low_rank.right)``.

    Args:
        left: [..., k], m rows in all; two-dimensional if ``out`` is given.
        right: [k, n].
        out: [m, n], overwritten; ``None`` allocates it.
        scale: multiplies the result.
        accumulate: add to ``out``.
        low_rank: a term of the same shape.

    Returns:
        [..., n], or ``out``.
    """
    result = left @ right
    if low_rank is not None:
        result = result + low_rank.left @ low_rank.right * low_rank.scale
    result = result * scale
    if out is None:
        return result
    return out.copy_(out + result if accumulate else result)


def matmul(
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    scale: float = 1.0,
    accumulate: bool = False,
    low_rank: LowRankTerm | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Computes ``matmul_reference``, without a gradient; ``backend`` as in ``takes_native``."""
    if out is None:
        result = left.new_empty(*left.shape[:-1], right.shape[1])
        rows = left.reshape(-1, left.shape[-1])
        matmul(rows, right, out=result.view(-1, right.shape[1]), scale=scale, low_rank=low_rank, backend=backend)
        return result
    others = () if low_rank is None else (low_rank.left, low_rank.right)
    if runs_native(left, right, out, *others, backend=backend):
        native.matmul(left, right, out, scale=scale, accumulate=accumulate, low_rank=low_rank)
        return out
    if accumulate:
        out.addmm_(left, right, alpha=scale)
    else:
        blocked_matmul(left, right, out)
        if scale != 1.0:
            out.mul_(scale)
    if low_rank is not None:
        out.addmm_(low_rank.left, low_rank.right, alpha=scale * low_rank.scale)
    return out


def runs_native(
    left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, *others: torch.Tensor, backend: str
) -> bool:
    """Returns whether the matmul runs in C, which adds a low-rank term in the same pass."""
    return takes_native(backend, left, right, out, *others) and native.supports(left, right, out)
