"""Sampling of a token from its logits, with its log-probability, without sorting and without a wait for the device."""

from __future__ import annotations

import torch


def sample(logits: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row from softmax(logits), by the exponential race: argmax of p / Exp(1).

    Args:
        logits: [b, v], float32 or wider, temperature applied. Overwritten.
        generator: the randomness; the same state and logits give the same tokens on a device.

    Returns:
        Tokens [b] int64, and their log-probabilities [b].
    """
    norm = torch.logsumexp(logits, -1)
    noise = torch.empty_like(logits).exponential_(generator=generator)
    tokens = torch.argmax(noise.log_().neg_().add_(logits), -1)
    return tokens, logits.gather(-1, tokens[:, None]).squeeze(-1) - norm
