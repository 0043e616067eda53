"""Root-mean-square normalisation (arXiv:1910.07467) that keeps its input and one number a row, nothing else.

Shapes: n = rows, d = hidden size.
"""

from __future__ import annotations

from typing import Any

import torch


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


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The fast form of ``rms_norm_reference``, with the same gradients."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        normalised: torch.Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return normalised
    return _scaled(x, _inverse_rms(x, eps), weight)


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / √(mean x² + eps), [..., 1], in float32 or wider and without a tensor of the input's size."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return torch.addcmul(norm.new_full((), eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()


def _scaled(x: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    normalised = x * inverse  # float32 where x is narrower
    return (normalised if normalised.dtype == x.dtype else normalised.to(x.dtype)).mul_(weight)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        return _scaled(x, inverse, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        (grad,) = grads
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (x * inverse).to(x.dtype).mul_(grad).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            # With u = x · inverse: dx = inverse · (g − u · mean(g · u)), g = grad · weight.
            scaled = (grad * weight).to(inverse.dtype)
            mean = torch.linalg.vecdot(scaled, x.to(inverse.dtype))[..., None].mul_(inverse.square()).div_(x.shape[-1])
            grad_x = scaled.addcmul_(mean, x.to(inverse.dtype), value=-1).mul_(inverse).to(x.dtype)
        return grad_x, grad_weight, None
