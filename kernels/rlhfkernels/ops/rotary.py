"""Rotary positions (arXiv:2104.09864) applied in place: nothing is kept but the tables.

Shapes: m = positions of all rows, t = of one row, n = numbers of a position, e = head size, s = its rotated part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlhfkernels.ops.forms import takes_native, takes_triton
from rlhfkernels.ops.heads import RotaryPart
from rlhfkernels.ops.native import rotary as native


def rotary_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The plain form: x cos + (−x₂, x₁) sin, with x₁ and x₂ the halves of x.

    Args:
        x: [..., s].
        cos: broadcasts to x; both its halves are equal.
        sin: likewise.

    Returns:
        [..., s].
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def signed(sin: torch.Tensor) -> torch.Tensor:
    """The table of ``rotary_``: (−sin, sin), so that the rotation is x cos + (x₂, x₁) (−sin, sin)."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)


def rotary_(
    x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, part: RotaryPart, *, kernels: str = "auto"
) -> torch.Tensor:
    """Rotates a part of ``x`` in place, with the gradient of ``rotary_reference`` there and of nothing elsewhere.

    Args:
        x: [m, n]; no view of another tensor where it is differentiated.
        cos: [1 or m / t, t, s]; row i of ``x`` is position i mod t.
        signed_sin: like ``cos``, of ``signed``.
        part: what is rotated.
        kernels: as in ``takes_triton``.

    Returns:
        ``x``.
    """
    turn = _form(x, cos, kernels)
    if torch.is_grad_enabled() and x.requires_grad:
        rotated: torch.Tensor = _Rotary.apply(x, cos, signed_sin, part, turn)  # type: ignore[no-untyped-call]
        return rotated
    turn(x, cos, signed_sin, part, 1.0)
    return x


# Rotates in place by the tables, or back by them where its last argument is -1.
_Turn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, RotaryPart, float], None]


def _form(x: torch.Tensor, cos: torch.Tensor, kernels: str) -> _Turn:
    if takes_triton(x, kernels):
        from rlhfkernels.ops.triton import rotary as form

        if form.covers(x):
            return form.turn
    return native.turn if takes_native(kernels, x, cos) and x.is_contiguous() else _turn


def _turn(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, part: RotaryPart, way: float) -> None:
    whole = x.view(-1, cos.shape[1], part.blocks, part.groups, x.shape[-1] // (part.blocks * part.groups))
    rotated = whole[..., : part.rotated, : cos.shape[-1]]
    swapped = rotated.roll(cos.shape[-1] // 2, -1)
    rotated.mul_(cos[:, :, None, None]).addcmul_(swapped, signed_sin[:, :, None, None], value=way)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, part: RotaryPart, turn: _Turn
    ) -> torch.Tensor:
        turn(x, cos, signed_sin, part, 1.0)
        ctx.mark_dirty(x)
        ctx.save_for_backward(cos, signed_sin)
        ctx.part, ctx.turn = part, turn
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        cos, signed_sin = ctx.saved_tensors
        # A copy: what autograd hands out may be somebody else's as well.
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        # The inverse of a rotation is the rotation the other way.
        ctx.turn(grad, cos, signed_sin, ctx.part, -1.0)
        return grad, None, None, None, None
