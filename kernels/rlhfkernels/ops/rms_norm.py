"""RMS norm (arXiv:1910.07467). Keeps for the backward its input and one float a row.

Shapes: n = rows, d = hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from rlhfkernels.ops.dispatch import takes_native, takes_triton
from rlhfkernels.ops.library_kernels import LibraryKernel
from rlhfkernels.ops.native import rms_norm as native

# Estimate: 2 MiB of bfloat16 take an H100 about 1 us, less than any launch.
_MAX_LAUNCH_BOUND_ELEMENTS = 2**20
# Inputs that other libraries are measured at: a micro-batch of a 7B model.
_MEASURED_ROWS, _MEASURED_SIZE, _MEASURED_EPS = 4096, 4096, 1e-5


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalizes in float32 or wider, rounds to the input's dtype, then scales, as Llama does.

    Args:
        x: [..., d].
        weight: [d].
        eps: added to the mean square.

    Returns:
        [..., d].
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str = "auto") -> torch.Tensor:
    """Computes ``rms_norm_reference`` and its gradients; ``backend`` as in ``takes_triton`` and ``takes_native``."""
    with_graph = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not with_graph and _is_bound_by_launch(x):
        return nn.functional.rms_norm(x, weight.shape, weight, eps)
    if with_graph and LIGER.use_for(x, backend):
        return _liger((x, weight), eps)
    kernels = _kernels(x, weight, backend)
    if with_graph:
        y: torch.Tensor = _RmsNorm.apply(x, weight, eps, kernels)  # type: ignore[no-untyped-call]
        return y
    return kernels.forward(x, weight, eps)[0]


def _is_bound_by_launch(x: torch.Tensor) -> bool:
    """Returns whether the norm of a few rows on an accelerator costs more to launch than to compute.

    torch's own op is one kernel, launched in C++. It scales before it rounds: bfloat16 results differ by one rounding.
    """
    return not x.is_cpu and x.numel() <= _MAX_LAUNCH_BOUND_ELEMENTS


class _Kernels(NamedTuple):
    """Functions of a backend.

    Attributes:
        forward: (x, weight, eps) to the result and to 1 / √(mean x² + eps), [..., 1].
        backward: (gradient, x, weight, inverse, whether x and weight need gradients) to the two gradients.
    """

    forward: Callable[[torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor | None, torch.Tensor | None]]


def _kernels(x: torch.Tensor, weight: torch.Tensor, backend: str) -> _Kernels:
    if takes_triton(x, backend):
        from rlhfkernels.ops.triton import rms_norm as triton

        if triton.supports(x):
            return _Kernels(triton.forward, triton.backward)
    return _NATIVE if takes_native(backend, x, weight) else _TORCH


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns 1 / √(mean x² + eps), [..., 1], in float32 or wider, without a temporary of the input's size."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return torch.addcmul(norm.new_full((), eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()


def _forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    inverse = _inverse_rms(x, eps)
    normalized = x * inverse  # float32 where x is narrower
    return (normalized if normalized.dtype == x.dtype else normalized.to(x.dtype)).mul_(weight), inverse


def _backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor, needed: tuple[bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    grad_x = grad_weight = None
    if needed[1]:
        grad_weight = (x * inverse).to(x.dtype).mul_(grad).flatten(0, -2).sum(0)
    if needed[0]:
        # With u = x · inverse and g = grad · weight: dx = inverse · (g − u · mean(g · u)).
        scaled = (grad * weight).to(inverse.dtype)
        mean = torch.linalg.vecdot(scaled, x.to(inverse.dtype))[..., None].mul_(inverse.square()).div_(x.shape[-1])
        grad_x = scaled.addcmul_(mean, x.to(inverse.dtype), value=-1).mul_(inverse).to(x.dtype)
    return grad_x, grad_weight


_TORCH = _Kernels(_forward, _backward)
_NATIVE = _Kernels(native.forward, native.backward)


def _liger(tensors: tuple[torch.Tensor, ...], eps: float) -> torch.Tensor:
    """Computes the norm by liger-kernel, which rounds as Llama does and keeps the input and one float a row."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # It starts its kernels on the current device.
    with torch.cuda.device_of(tensors[0]):  # type: ignore[no-untyped-call]
        y: torch.Tensor = LigerRMSNormFunction.apply(*tensors, eps, 0.0, "llama", False)
    return y


def _own(tensors: tuple[torch.Tensor, ...], eps: float) -> torch.Tensor:
    x, weight = tensors
    y: torch.Tensor = _RmsNorm.apply(x, weight, eps, _kernels(x, weight, "auto"))  # type: ignore[no-untyped-call]
    return y


def _measured(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(_MEASURED_ROWS, _MEASURED_SIZE, generator=generator, device=device).to(dtype)
    return x, torch.ones(_MEASURED_SIZE, device=device, dtype=dtype)


LIGER = LibraryKernel(
    op="rms_norm",
    package="liger_kernel",
    ours=functools.partial(_own, eps=_MEASURED_EPS),
    theirs=functools.partial(_liger, eps=_MEASURED_EPS),
    inputs=_measured,
)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, kernels: _Kernels) -> torch.Tensor:
        y, inverse = kernels.forward(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.kernels = kernels
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return *ctx.kernels.backward(grads[0], *ctx.saved_tensors, ctx.needs_input_grad[:2]), None, None
