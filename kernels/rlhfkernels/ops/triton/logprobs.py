"""What is asked of a chunk's logits: they are read once for the sums, once more where their slope takes their place.

The raw products are what is read: widening, scale, cap and temperature happen in registers, so no wide copy is made.

Shapes: m = rows of the chunk, d = hidden size, v = vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import nn

from rlhfkernels.ops.logit_shape import LogitShape
from rlhfkernels.ops.triton.launch import block_of, on_device_of, options

_WIDEST = 4096


@triton.jit
def _shaped(raw, scale, softcap, inverse_temperature, capped: tl.constexpr):
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
    with_slope: tl.constexpr,
    with_weights: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    raws = raw_ptr + row * v
    columns = tl.arange(0, block)
    # Each lane sums what it sees, in units of e to its own highest logit so far; finite, so that no 0 · ∞ arises.
    highest = tl.full((block,), -1e30, dtype=tl.float32)
    mass = tl.zeros((block,), dtype=tl.float32)
    moment = tl.zeros((block,), dtype=tl.float32)
    for start in range(0, v, block):
        inside = start + columns < v
        raw = tl.load(raws + start + columns, mask=inside, other=0.0).to(tl.float32)
        logits = tl.where(inside, _shaped(raw, scale, softcap, inverse_temperature, capped), -1e30)
        above = tl.maximum(highest, logits)
        shrunk = tl.exp(highest - above)
        share = tl.where(inside, tl.exp(logits - above), 0.0)
        if with_entropy:
            moment = shrunk * (moment + mass * (highest - above)) + share * (logits - above)
        mass = shrunk * mass + share
        highest = above
    top = tl.max(highest, axis=0)
    shrunk = tl.exp(highest - top)
    total = tl.sum(shrunk * mass, axis=0)
    log_total = tl.log(total)
    target = tl.load(targets_ptr + row)
    picked = _shaped(tl.load(raws + target).to(tl.float32), scale, softcap, inverse_temperature, capped)
    tl.store(logprobs_ptr + row, picked - top - log_total)
    entropy = log_total
    if with_entropy:
        # H = log Σ e^z − Σ p z, with z counted from the top.
        entropy = log_total - tl.sum(shrunk * (moment + mass * (highest - top)), axis=0) / total
        tl.store(entropies_ptr + row, entropy)
    if with_slope:
        logprob_weight = 1.0
        if with_weights:
            logprob_weight = tl.load(logprob_weights_ptr + row).to(tl.float32)
            if with_entropy:
                entropy_weight = tl.load(entropy_weights_ptr + row).to(tl.float32)
        tl.debug_barrier()  # the picked logit has been read by every thread before it is overwritten
        for start in range(0, v, block):
            inside = start + columns < v
            raw = tl.load(raws + start + columns, mask=inside, other=0.0)
            logits = _shaped(raw.to(tl.float32), scale, softcap, inverse_temperature, capped)
            logprobs = logits - top - log_total
            probabilities = tl.exp(logprobs)
            slope = (tl.where(start + columns == target, 1.0, 0.0) - probabilities) * logprob_weight
            if with_weights and with_entropy:
                slope -= probabilities * (logprobs + entropy) * entropy_weight
            if capped:
                tanh = logits / (inverse_temperature * softcap)
                slope *= 1.0 - tanh * tanh
            slope *= scale * inverse_temperature
            tl.store(raws + start + columns, slope.to(raw.dtype), mask=inside)


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
    raw = nn.functional.linear(hidden, weight, bias)
    if not slopes:
        _run(shape, raw, targets, logprobs, entropies, slope=False)
        return
    if entropies is None:
        _run(shape, raw, targets, logprobs, None, slope=True)
        torch.mm(raw, weight, out=slopes[0])
        return
    ones = torch.ones_like(logprobs)
    for slope, weights in zip(slopes, ((ones, ones - 1), (ones - 1, ones)), strict=True):
        products = raw.clone() if slope is slopes[0] else raw
        _run(shape, products, targets, logprobs, entropies, slope=True, weights=weights)
        torch.mm(products, weight, out=slope)


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
    raw = nn.functional.linear(hidden, weight, bias)
    grad_logprobs = grad_logprobs.contiguous()
    found = torch.empty_like(grad_logprobs)
    if grad_entropies is None:
        _run(shape, raw, targets, found, None, slope=True, weights=(grad_logprobs, grad_logprobs))
    else:
        weights = (grad_logprobs, grad_entropies.contiguous())
        _run(shape, raw, targets, found, torch.empty_like(found), slope=True, weights=weights)
    return raw


def _run(
    shape: LogitShape,
    raw: torch.Tensor,
    targets: torch.Tensor,
    logprobs: torch.Tensor,
    entropies: torch.Tensor | None,
    *,
    slope: bool,
    weights: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Fills in ``logprobs`` and ``entropies`` [m]; ``slope``: that of their weighted sum takes the place of ``raw``."""
    m, v = raw.shape
    block = block_of(v, _WIDEST)
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
            float(shape.scale),
            float(shape.softcap or 1.0),
            1.0 / shape.temperature,
            capped=shape.softcap is not None,
            with_entropy=entropies is not None,
            with_slope=slope,
            with_weights=weights is not None,
            block=block,
            **options(block),
        )
