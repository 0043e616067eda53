"""A product of many rows with a weight of some thousand outputs, as every layer of a full-length pass asks for.

On a processor the library's float32 product loses up to a quarter of its rate once there are somewhat more than a
thousand outputs and few rows for each core; in blocks of fewer columns it keeps the rate. From some thousand outputs on
the blocks gain little, and every block is a call: there the product is left whole.

Shapes: m = rows, k = summed over, n = outputs.
"""

from __future__ import annotations

import torch

_BLOCK = 768  # outputs of one call at most
_MOST = 4096  # outputs from which on the product is left whole
_FEWEST_ROWS = 384


def wide_product_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The plain form: ``x @ weight``.

    Args:
        x: [..., k], m rows in all.
        weight: [k, n].

    Returns:
        [..., n].
    """
    return x @ weight


def wide_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The fast form; arguments and result as ``wide_product_reference``, no gradient."""
    n = weight.shape[1]
    m, blocks = x.numel() // x.shape[-1], -(-n // _BLOCK)
    if not x.is_cpu or x.dtype != torch.float32 or m < _FEWEST_ROWS or blocks == 1 or n > _MOST:
        return torch.matmul(x, weight)
    out = x.new_empty(*x.shape[:-1], n)
    rows, size = x.reshape(m, -1), -(-n // blocks)
    for piece, columns in zip(torch.split(weight, size, 1), torch.split(out.view(m, n), size, 1), strict=True):
        torch.mm(rows, piece, out=columns)
    return out
