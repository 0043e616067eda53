"""Log-probabilities and entropies of a chunk, from one read of the raw outputs, and their gradients from another.

Widening, scale, cap and temperature happen in registers, so no float32 copy of the logits is made.

Shapes: m = rows of the chunk, d = hidden size, v = vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import nn

from rlhfkernels.ops.logit_transform import LogitTransform
from rlhfkernels.ops.triton.launch import block_size, compile_options, on_device_of

_MAX_BLOCK = 4096


@triton.jit
def _logits(raw, scale, softcap, inverse_temperature, capped: tl.constexpr):
    logits = raw * scale
    if capped:
        logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)  # softcap · tanh(logits / softcap)
    return logits * inverse_temperature


@triton.jit
def _kernel(
    raw_ptr,
    targets_ptr,
    logprobs_ptr,
    entropies_ptr,
    logprob_weights_ptr,
    entropy_weights_ptr,
    v,
    scale,
    softcap,
    inverse_temperature,
    capped: tl.constexpr,
    with_entropy: tl.constexpr,
    with_gradient: tl.constexpr,
    with_weights: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    raws = raw_ptr + row * v
    columns = tl.arange(0, block)
    # Each lane sums its exponentials relative to its own running maximum. It starts finite, to avoid 0 · ∞.
    maximum = tl.full((block,), -1e30, dtype=tl.float32)
    sum_exp = tl.zeros((block,), dtype=tl.float32)
    moment = tl.zeros((block,), dtype=tl.float32)
    for start in range(0, v, block):
        inside = start + columns < v
        raw = tl.load(raws + start + columns, mask=inside, other=0.0).to(tl.float32)
        logits = tl.where(inside, _logits(raw, scale, softcap, inverse_temperature, capped), -1e30)
        new_maximum = tl.maximum(maximum, logits)
        rescale = tl.exp(maximum - new_maximum)
        exps = tl.where(inside, tl.exp(logits - new_maximum), 0.0)
        if with_entropy:
            moment = rescale * (moment + sum_exp * (maximum - new_maximum)) + exps * (logits - new_maximum)
        sum_exp = rescale * sum_exp + exps
        maximum = new_maximum
    top = tl.max(maximum, axis=0)
    rescale = tl.exp(maximum - top)
    total = tl.sum(rescale * sum_exp, axis=0)
    log_total = tl.log(total)
    target = tl.load(targets_ptr + row)
    picked = _logits(tl.load(raws + target).to(tl.float32), scale, softcap, inverse_temperature, capped)
    tl.store(logprobs_ptr + row, picked - top - log_total)
    entropy = log_total
    if with_entropy:
        # H = log Σ e^z − Σ p z, with z relative to the maximum.
        entropy = log_total - tl.sum(rescale * (moment + sum_exp * (maximum - top)), axis=0) / total
        tl.store(entropies_ptr + row, entropy)
    if with_gradient:
        logprob_weight = 1.0
        if with_weights:
            logprob_weight = tl.load(logprob_weights_ptr + row).to(tl.float32)
            if with_entropy:
                entropy_weight = tl.load(entropy_weights_ptr + row).to(tl.float32)
        tl.debug_barrier()  # every thread must have read the target's logit before it is overwritten
        for start in range(0, v, block):
            inside = start + columns < v
            raw = tl.load(raws + start + columns, mask=inside, other=0.0)
            logits = _logits(raw.to(tl.float32), scale, softcap, inverse_temperature, capped)
            logprobs = logits - top - log_total
            probabilities = tl.exp(logprobs)
            gradient = (tl.where(start + columns == target, 1.0, 0.0) - probabilities) * logprob_weight
            if with_weights and with_entropy:
                gradient -= probabilities * (logprobs + entropy) * entropy_weight
            if capped:
                tanh = logits / (inverse_temperature * softcap)
                gradient *= 1.0 - tanh * tanh
            gradient *= scale * inverse_temperature
            tl.store(raws + start + columns, gradient.to(raw.dtype), mask=inside)


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
    raw = nn.functional.linear(hidden, weight, bias)
    if not gradients:
        _run(transform, raw, targets, logprobs, entropies, with_gradient=False)
        return
    if entropies is None:
        _run(transform, raw, targets, logprobs, None, with_gradient=True)
        torch.mm(raw, weight, out=gradients[0])
        return
    ones = torch.ones_like(logprobs)
    for gradient, weights in zip(gradients, ((ones, ones - 1), (ones - 1, ones)), strict=True):
        grad_raw = raw.clone() if gradient is gradients[0] else raw
        _run(transform, grad_raw, targets, logprobs, entropies, with_gradient=True, weights=weights)
        torch.mm(grad_raw, weight, out=gradient)


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
    raw = nn.functional.linear(hidden, weight, bias)
    grad_logprobs = grad_logprobs.contiguous()
    logprobs = torch.empty_like(grad_logprobs)
    if grad_entropies is None:
        _run(transform, raw, targets, logprobs, None, with_gradient=True, weights=(grad_logprobs, grad_logprobs))
    else:
        weights = (grad_logprobs, grad_entropies.contiguous())
        _run(transform, raw, targets, logprobs, torch.empty_like(logprobs), with_gradient=True, weights=weights)
    return raw


def _run(
    transform: LogitTransform,
    raw: torch.Tensor,
    targets: torch.Tensor,
    logprobs: torch.Tensor,
    entropies: torch.Tensor | None,
    *,
    with_gradient: bool,
    weights: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Writes ``logprobs`` and ``entropies`` [m], and the gradient of their weighted sum over ``raw`` if wanted."""
    m, v = raw.shape
    block = block_size(v, _MAX_BLOCK)
    logprob_weights, entropy_weights = weights or (logprobs, logprobs)
    with on_device_of(raw):
        _kernel[(m,)](
            raw,
            targets.contiguous(),
            logprobs,
            logprobs if entropies is None else entropies,
            logprob_weights,
            entropy_weights,
            v,
            float(transform.scale),
            float(transform.softcap or 1.0),
            1.0 / transform.temperature,
            capped=transform.softcap is not None,
            with_entropy=entropies is not None,
            with_gradient=with_gradient,
            with_weights=weights is not None,
            block=block,
            **compile_options(block),
        )
