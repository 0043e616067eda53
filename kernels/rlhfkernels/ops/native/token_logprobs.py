"""Log-probabilities of a chunk in C, and their gradient. Entropies and capped logits are left to torch."""

from __future__ import annotations

import torch

from rlhfkernels.ops.logit_transform import LogitTransform
from rlhfkernels.ops.matmul import matmul
from rlhfkernels.ops.native.launch import check_shape, launch
from rlhfkernels.ops.native.structures import TokenLogprobs


def supports(transform: LogitTransform, *, entropy: bool) -> bool:
    """Returns whether the C computes these log-probabilities."""
    return transform.softcap is None and transform.scale > 0 and not entropy


def forward(
    transform: LogitTransform,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    logprobs: torch.Tensor,
    entropies: torch.Tensor | None,
    gradients: list[torch.Tensor],
) -> None:
    """See ``rlhfkernels.ops.token_logprobs.forward``."""
    assert entropies is None, "entropies are computed by torch"
    raw = _raw(hidden, weight, bias)
    _run(transform, raw, targets, logprobs, with_gradient=bool(gradients))
    for gradient in gradients:
        matmul(raw, weight, out=gradient, backend="native")


def backward(
    transform: LogitTransform,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    entropies: torch.Tensor | None,
    grad_logprobs: torch.Tensor,
    grad_entropies: torch.Tensor | None,
) -> torch.Tensor:
    """See ``rlhfkernels.ops.token_logprobs.backward``."""
    assert grad_entropies is None, "entropies are computed by torch"
    raw = _raw(hidden, weight, bias)
    weights = grad_logprobs.contiguous()
    _run(transform, raw, targets, torch.empty_like(weights), with_gradient=True, weights=weights)
    return raw


def _raw(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns the outputs of the head, [n, v]."""
    raw = matmul(hidden, weight.t(), backend="native")
    return raw if bias is None else raw.add_(bias)


def _run(
    transform: LogitTransform,
    raw: torch.Tensor,
    targets: torch.Tensor,
    logprobs: torch.Tensor,
    *,
    with_gradient: bool,
    weights: torch.Tensor | None = None,
) -> None:
    n, v = raw.shape
    for name, tensor in (("targets", targets), ("logprobs", logprobs), ("weights", weights)):
        check_shape(name, tensor, n)
    launch(
        "token_logprobs",
        TokenLogprobs,
        n,
        raw=raw,
        targets=targets.contiguous(),
        out=logprobs,
        weights=weights,
        rows=n,
        size=v,
        with_gradient=int(with_gradient),
        factor=transform.scale / transform.temperature,
    )
