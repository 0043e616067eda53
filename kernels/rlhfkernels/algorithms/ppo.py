"""The clipped losses of PPO (arXiv:1707.06347, equation 7; trlX, section 3), as sums over tokens divided by a count
that the caller gives, so that the objective does not depend on how a batch is split.

Shapes: b = batch, c = completion length.
"""

from __future__ import annotations

import torch


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_range: float,
    num_tokens: torch.Tensor | int,
) -> torch.Tensor:
    """−Σ min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) / num_tokens, ρ = π / π_old.

    Args:
        logprobs: [b, c], of the policy that is trained.
        old_logprobs: [b, c], of the policy that sampled.
        advantages: [b, c].
        mask: [b, c], 1.0 on real tokens.
        clip_range: ε.
        num_tokens: real tokens of the whole mini-batch, of which these rows may be a part.

    Returns:
        A scalar.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    return -(objective * mask).sum() / num_tokens


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_range: float,
    num_tokens: torch.Tensor | int,
) -> torch.Tensor:
    """½ Σ max((V − R)², (clip(V, V_old − ε, V_old + ε) − R)²) / num_tokens; arguments as in ``policy_loss``."""
    clipped = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    squared = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * (squared * mask).sum() / num_tokens
