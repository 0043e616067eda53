"""Torch's matmul on the CPU, in blocks of columns where MKL is slow without.

MKL's float32 GEMM loses up to a quarter of its rate with somewhat more than a thousand columns and few rows a core; in
blocks of fewer columns it keeps the rate. From 4096 columns on, blocks gain little, and every block costs a call.

Shapes: m = rows, k = summed over, n = columns.
"""

from __future__ import annotations

import torch

_MAX_BLOCK_COLUMNS = 768
_MAX_SPLIT_COLUMNS, _MIN_SPLIT_ROWS = 4096, 384


def blocked_matmul(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """Computes ``out = left @ right`` of [m, k] and [k, n]."""
    m, n = out.shape
    num_blocks = -(-n // _MAX_BLOCK_COLUMNS)
    if not left.is_cpu or left.dtype != torch.float32 or m < _MIN_SPLIT_ROWS or n > _MAX_SPLIT_COLUMNS:
        num_blocks = 1
    size = -(-n // num_blocks)
    for block, columns in zip(torch.split(right, size, 1), torch.split(out, size, 1), strict=True):
        torch.mm(left, block, out=columns)
