"""Root-mean-square normalisation (arXiv:1910.07467) that keeps its input and one number a row, nothing else.

Shapes: n = rows, d = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from rlhfkernels.ops.forms import takes_native, takes_triton
from rlhfkernels.ops.native import rms_norm as native


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The plain form, as Llama rounds it: normalised in float32 or wider, rounded to the input's dtype, then scaled.

    Args:
        x: [..., d].
        weight: [d].
        eps: added to the mean square.

    Returns:
        [..., d].
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, kernels: str = "auto") -> torch.Tensor:
    """The fast form of ``rms_norm_reference``, with the same gradients; ``kernels`` as in ``takes_triton``."""
    form = _form(x, weight, kernels)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        normalised: torch.Tensor = _RmsNorm.apply(x, weight, eps, form)  # type: ignore[no-untyped-call]
        return normalised
    return form.forward(x, weight, eps)[0]


class _Form(NamedTuple):
    """How it is computed.

    Attributes:
        forward: (x, weight, eps) to the result and to 1 / √(mean x² + eps), [..., 1].
        backward: (gradient, x, weight, what ``forward`` gave beside the result, whether the gradients of x and of
            weight are needed) to these two.
    """

    forward: Callable[[torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor | None, torch.Tensor | None]]


def _form(x: torch.Tensor, weight: torch.Tensor, kernels: str) -> _Form:
    if takes_triton(x, kernels):
        from rlhfkernels.ops.triton import rms_norm as form

        if form.covers(x):
            return _Form(form.forward, form.backward)
    return _NATIVE if takes_native(kernels, x, weight) else _TORCH


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / √(mean x² + eps), [..., 1], in float32 or wider and without a tensor of the input's size."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return torch.addcmul(norm.new_full((), eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()


def _scaled(x: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    normalised = x * inverse  # float32 where x is narrower
    return (normalised if normalised.dtype == x.dtype else normalised.to(x.dtype)).mul_(weight)


def _forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    inverse = _inverse_rms(x, eps)
    return _scaled(x, inverse, weight), inverse


def _backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor, needed: tuple[bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    grad_x = grad_weight = None
    if needed[1]:
        grad_weight = (x * inverse).to(x.dtype).mul_(grad).flatten(0, -2).sum(0)
    if needed[0]:
        # With u = x · inverse: dx = inverse · (g − u · mean(g · u)), g = grad · weight.
        scaled = (grad * weight).to(inverse.dtype)
        mean = torch.linalg.vecdot(scaled, x.to(inverse.dtype))[..., None].mul_(inverse.square()).div_(x.shape[-1])
        grad_x = scaled.addcmul_(mean, x.to(inverse.dtype), value=-1).mul_(inverse).to(x.dtype)
    return grad_x, grad_weight


_TORCH = _Form(_forward, _backward)
_NATIVE = _Form(native.forward, native.backward)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, form: _Form) -> torch.Tensor:
        normalised, inverse = form.forward(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.form = form
        return normalised

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return *ctx.form.backward(grads[0], *ctx.saved_tensors, ctx.needs_input_grad[:2]), None, None
