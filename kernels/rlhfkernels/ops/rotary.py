"""Rotary position embedding (arXiv:2104.09864), in place. Keeps for the backward its tables only.

Shapes: m = positions of all rows, t = positions of a row, n = elements of a position, e = head size, s = rotated
elements of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlhfkernels.ops.dispatch import takes_native, takes_triton
from rlhfkernels.ops.native import rotary as native
from rlhfkernels.ops.qkv_layout import RotaryPart


def make_signed_sin(sin: torch.Tensor) -> torch.Tensor:
    """Negates the first half of a table of sines: the rotation becomes x cos + (x₂, x₁) signed_sin."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)


def rotary_reference(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, part: RotaryPart) -> torch.Tensor:
    """Rotates a part of ``x``: x cos + (x₂, x₁) signed_sin, with x₁ and x₂ the halves of x.

    Args:
        x: [m, n].
        cos: [1 or m / t, t, s]; row i of ``x`` is position i mod t. Both halves are equal.
        signed_sin: [1 or m / t, t, s], of ``make_signed_sin``.
        part: the part of ``x``.

    Returns:
        [m, n].
    """
    heads = x.view(-1, cos.shape[1], part.blocks, part.groups, x.shape[-1] // (part.blocks * part.groups))
    rotated, size = heads[..., : part.rotated, :], cos.shape[-1]
    first, second = rotated[..., :size].chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    turned = rotated[..., :size] * cos[:, :, None, None] + swapped * signed_sin[:, :, None, None]
    rotated = torch.cat((turned, rotated[..., size:]), dim=-1)
    return torch.cat((rotated, heads[..., part.rotated :, :]), dim=-2).view(x.shape)


def rotary_(
    x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, part: RotaryPart, *, backend: str = "auto"
) -> torch.Tensor:
    """Computes ``rotary_reference`` and its gradient in place.

    Args:
        x: [m, n]; not a view if it is differentiated.
        cos: as in ``rotary_reference``.
        signed_sin: as in ``rotary_reference``.
        part: the part of ``x``.
        backend: as in ``takes_triton`` and ``takes_native``.

    Returns:
        ``x``.
    """
    rotate_ = _kernel(x, cos, backend)
    if torch.is_grad_enabled() and x.requires_grad:
        rotated: torch.Tensor = _Rotary.apply(x, cos, signed_sin, part, rotate_)  # type: ignore[no-untyped-call]
        return rotated
    rotate_(x, cos, signed_sin, part, 1.0)
    return x


# Rotates in place; the last argument is the direction: 1, or -1 for the inverse.
_Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, RotaryPart, float], None]


def _kernel(x: torch.Tensor, cos: torch.Tensor, backend: str) -> _Kernel:
    if takes_triton(x, backend):
        from rlhfkernels.ops.triton import rotary as triton

        if triton.supports(x):
            return triton.rotate_
    return native.rotate_ if takes_native(backend, x, cos) and x.is_contiguous() else _rotate_


def _rotate_(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, part: RotaryPart, direction: float) -> None:
    heads = x.view(-1, cos.shape[1], part.blocks, part.groups, x.shape[-1] // (part.blocks * part.groups))
    rotated = heads[..., : part.rotated, : cos.shape[-1]]
    swapped = rotated.roll(cos.shape[-1] // 2, -1)
    rotated.mul_(cos[:, :, None, None]).addcmul_(swapped, signed_sin[:, :, None, None], value=direction)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, part: RotaryPart, kernel: _Kernel
    ) -> torch.Tensor:
        kernel(x, cos, signed_sin, part, 1.0)
        ctx.mark_dirty(x)
        ctx.save_for_backward(cos, signed_sin)
        ctx.part, ctx.kernel = part, kernel
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        cos, signed_sin = ctx.saved_tensors
        # A copy: autograd may hand the same gradient to another op.
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        ctx.kernel(grad, cos, signed_sin, ctx.part, -1.0)
        return grad, None, None, None, None
