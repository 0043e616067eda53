"""Sampling of a token from its logits, with its log-probability, without a sort and without a device synchronization.

Shapes: b = rows, v = vocabulary.
"""

from __future__ import annotations

import torch

from rlhfkernels.ops.dispatch import takes_native
from rlhfkernels.ops.native import sample as native


def sample_reference(logits: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverts the cumulative distribution of softmax(logits) in float64.

    Args:
        logits: [b, v], float32 or wider, divided by the temperature.
        generator: source of one uniform number a row.

    Returns:
        Tokens [b] int64, and their log-probabilities [b] float64.
    """
    uniform = torch.rand(logits.shape[0], 1, generator=generator, dtype=logits.dtype, device=logits.device)
    logprobs = torch.log_softmax(logits.double(), -1)
    tokens = (logprobs.exp().cumsum(-1) <= uniform).sum(-1, keepdim=True).clamp_(max=logits.shape[1] - 1)
    return tokens.squeeze(-1), logprobs.gather(-1, tokens).squeeze(-1)


def sample(
    logits: torch.Tensor, generator: torch.Generator | None, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes ``sample_reference`` in the dtype of the logits.

    One uniform number a row is cheaper than noise for every token of the vocabulary, as in the Gumbel-max trick. Its 24
    bits meet probabilities to 2⁻²⁴.

    Args:
        logits: [b, v], overwritten.
        generator: source of randomness. On a CPU, the same state and logits give the same tokens. On CUDA they need
            not: torch documents its floating-point scan there as nondeterministic.
        backend: as in ``takes_native``.

    Returns:
        Tokens [b] int64, and their log-probabilities [b], NaN for a row whose probabilities are.
    """
    if takes_native(backend, logits):
        uniform = torch.rand(logits.shape[0], generator=generator, dtype=logits.dtype)
        return native.draw(logits.contiguous(), uniform)
    probabilities = torch.softmax(logits, -1)
    sums = torch.cumsum(probabilities, -1, out=logits)
    # The last sum is near 1, not 1. Strictly below it and to the right of equals: no token of probability 0.
    ends = sums[:, -1:]
    uniform = torch.rand(ends.shape, generator=generator, dtype=sums.dtype, device=sums.device)
    thresholds = torch.minimum(uniform * ends, torch.nextafter(ends, torch.zeros_like(ends)))
    # Only a NaN can lie beyond the last sum. Unclamped, its index would abort the CUDA context in the gather.
    tokens = torch.searchsorted(sums, thresholds, right=True).clamp_(max=sums.shape[1] - 1)
    # The rounding of CUDA's scan may draw one all the same: log 0 would look like logits that are not finite.
    smallest = torch.finfo(probabilities.dtype).tiny
    return tokens.squeeze(-1), probabilities.gather(-1, tokens).clamp_min_(smallest).log_().squeeze(-1)
