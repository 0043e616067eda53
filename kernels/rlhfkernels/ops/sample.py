"""Sampling of a token from its logits, with its log-probability, without sorting and without a wait for the device."""

from __future__ import annotations

import torch

from rlhfkernels.ops.forms import takes_native
from rlhfkernels.ops.native import sample as native


def sample(
    logits: torch.Tensor, generator: torch.Generator | None, *, kernels: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row from softmax(logits): where one uniform number falls among the summed probabilities.

    Noise for every token of the vocabulary, as an exponential race asks for, costs more than everything else here. A
    uniform number has 24 bits, so probabilities are met to 2⁻²⁴.

    Args:
        logits: [b, v], float32 or wider, temperature applied. Overwritten.
        generator: the randomness; the same state and logits give the same tokens on a device.
        kernels: as in ``takes_native``.

    Returns:
        Tokens [b] int64, and their log-probabilities [b].
    """
    if takes_native(kernels, logits):
        uniform = torch.rand(logits.shape[0], generator=generator, dtype=logits.dtype)
        return native.draw(logits.contiguous(), uniform)
    probabilities = torch.softmax(logits, -1)
    sums = torch.cumsum(probabilities, -1, out=logits)
    # The sums end near 1, not at it. Strictly below that and to the right of equals: no token of probability 0.
    ends = sums[:, -1:]
    uniform = torch.rand(ends.shape, generator=generator, dtype=sums.dtype, device=sums.device)
    points = torch.minimum(uniform * ends, torch.nextafter(ends, torch.zeros_like(ends)))
    tokens = torch.searchsorted(sums, points, right=True)
    return tokens.squeeze(-1), probabilities.gather(-1, tokens).log_().squeeze(-1)
