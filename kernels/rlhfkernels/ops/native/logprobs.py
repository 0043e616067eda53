"""The form in C of what ``rlhfkernels.ops.logprobs`` does with a chunk; entropies and capped logits are torch's."""

from __future__ import annotations

import torch

from rlhfkernels.ops.logit_shape import LogitShape
from rlhfkernels.ops.native.launch import launch
from rlhfkernels.ops.native.structures import Logprobs
from rlhfkernels.ops.product import product


def covers(shape: LogitShape, *, entropy: bool) -> bool:
    """Whether it is this form's."""
    return shape.softcap is None and shape.scale > 0 and not entropy


def read(
    shape: LogitShape,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    logprobs: torch.Tensor,
    entropies: torch.Tensor | None,
    slopes: list[torch.Tensor],
) -> None:
    """Fills in what is asked of a chunk; see ``rlhfkernels.ops.logprobs.read``."""
    assert entropies is None, "entropies are torch's"
    raw = _raw(hidden, weight, bias)
    _run(shape, raw, targets, logprobs, slope=bool(slopes))
    for slope in slopes:
        product(raw, weight, out=slope, kernels="native")


def slope(
    shape: LogitShape,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    entropies: torch.Tensor | None,
    grad_logprobs: torch.Tensor,
    grad_entropies: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient of a chunk's raw products; see ``rlhfkernels.ops.logprobs.slope``."""
    assert grad_entropies is None, "entropies are torch's"
    raw = _raw(hidden, weight, bias)
    _run(shape, raw, targets, torch.empty_like(grad_logprobs), slope=True, weights=grad_logprobs.contiguous())
    return raw


def _raw(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The head's products, [n, v]."""
    raw = product(hidden, weight.t(), kernels="native")
    return raw if bias is None else raw.add_(bias)


def _run(
    shape: LogitShape,
    raw: torch.Tensor,
    targets: torch.Tensor,
    logprobs: torch.Tensor,
    *,
    slope: bool,
    weights: torch.Tensor | None = None,
) -> None:
    m, v = raw.shape
    launch(
        "logprobs",
        Logprobs,
        m,
        raw=raw,
        targets=targets.contiguous(),
        out=logprobs,
        weights=weights,
        rows=m,
        size=v,
        slope=int(slope),
        factor=shape.scale / shape.temperature,
    )
