"""Matmul of many rows, as every layer of a full-length forward pass needs.

MKL's float32 GEMM on the CPU loses up to a quarter of its rate with somewhat more than a thousand columns and few rows
a core; in blocks of fewer columns it keeps the rate. From 4096 columns on, blocks gain little, and every block costs a
call. The C backend divides the work evenly at any size.

Shapes: m = rows, k = summed over, n = columns, r = rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlhfkernels.ops.dispatch import takes_native
from rlhfkernels.ops.native import matmul as native

_MAX_BLOCK_COLUMNS = 768
_MAX_SPLIT_COLUMNS, _MIN_SPLIT_ROWS = 4096, 384


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
        _torch(left, right, out)
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


def _torch(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    m, n = out.shape
    num_blocks = -(-n // _MAX_BLOCK_COLUMNS)
    if not left.is_cpu or left.dtype != torch.float32 or m < _MIN_SPLIT_ROWS or n > _MAX_SPLIT_COLUMNS:
        num_blocks = 1
    size = -(-n // num_blocks)
    for block, columns in zip(torch.split(right, size, 1), torch.split(out, size, 1), strict=True):
        torch.mm(left, block, out=columns)
