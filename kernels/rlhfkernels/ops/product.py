"""A product of matrices of many rows, as every layer of a full-length pass asks for.

On a processor the library's float32 product loses up to a quarter of its rate once there are somewhat more than a
thousand columns and few rows for each core; in blocks of fewer columns it keeps the rate. From some thousand columns on
the blocks gain little, and every block is a call: there the product is left whole. The form in C divides the work
evenly whatever the sizes.

Shapes: m = rows, k = summed over, n = columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlhfkernels.ops.forms import takes_native
from rlhfkernels.ops.native import product as native

_BLOCK = 768  # columns of one call at most
_MOST = 4096  # columns from which on the product is left whole
_FEWEST_ROWS = 384


class Pair(NamedTuple):
    """A product that is part of another's sums.

    Attributes:
        left: [m, r].
        right: [r, n].
        scale: multiplies it.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float


def product_reference(
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    scale: float = 1.0,
    adds: bool = False,
    also: Pair | None = None,
) -> torch.Tensor:
    """The plain form: ``scale · (left @ right + also.scale · also.left @ also.right)``.

    Args:
        left: [..., k], m rows in all; two-dimensional where ``out`` is given.
        right: [k, n].
        out: [m, n], filled in; ``None`` makes one.
        scale: multiplies the product.
        adds: to what ``out`` holds.
        also: another product over the same rows and columns.

    Returns:
        [..., n], or ``out``.
    """
    found = left @ right
    if also is not None:
        found = found + also.left @ also.right * also.scale
    found = found * scale
    if out is None:
        return found
    return out.copy_(out + found if adds else found)


def product(
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    scale: float = 1.0,
    adds: bool = False,
    also: Pair | None = None,
    kernels: str = "auto",
) -> torch.Tensor:
    """The fast form; arguments and result as ``product_reference``, no gradient; ``kernels`` as in ``takes_native``."""
    if out is None:
        made = left.new_empty(*left.shape[:-1], right.shape[1])
        rows = left.reshape(-1, left.shape[-1])
        product(rows, right, out=made.view(-1, right.shape[1]), scale=scale, also=also, kernels=kernels)
        return made
    others = () if also is None else (also.left, also.right)
    if runs_in_c(left, right, out, *others, kernels=kernels):
        native.multiply(left, right, out, scale=scale, adds=adds, also=also)
        return out
    if adds:
        out.addmm_(left, right, alpha=scale)
    else:
        _multiply(left, right, out)
        if scale != 1.0:
            out.mul_(scale)
    if also is not None:
        out.addmm_(also.left, also.right, alpha=scale * also.scale)
    return out


def runs_in_c(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, *others: torch.Tensor, kernels: str) -> bool:
    """Whether it is the form in C, which sums a product and another of fewer columns at once."""
    return takes_native(kernels, left, right, out, *others) and native.covers(left, right, out)


def _multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    m, n = out.shape
    blocks = -(-n // _BLOCK)
    if not left.is_cpu or left.dtype != torch.float32 or m < _FEWEST_ROWS or n > _MOST:
        blocks = 1
    size = -(-n // blocks)
    for piece, columns in zip(torch.split(right, size, 1), torch.split(out, size, 1), strict=True):
        torch.mm(left, piece, out=columns)
