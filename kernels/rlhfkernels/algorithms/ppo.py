"""Proximal policy optimization (arXiv:1707.06347): the clipped losses, and the objectives and rewards of a PPO step.

Losses are sums over tokens divided by a count that the caller gives, so that the objective does not depend on how a
batch is split.

Shapes: n = sequences, c = completion length.
"""

from __future__ import annotations

import torch

from rlhfkernels.algorithms.advantages import gae, shaped_rewards, whiten
from rlhfkernels.algorithms.common import AllSum, Counts, Loss, Reader, alone, masked_mean
from rlhfkernels.config.options import Options
from rlhfkernels.data.batch import Batch


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    cliprange: float,
    num_tokens: torch.Tensor | int,
) -> torch.Tensor:
    """−Σ min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) / num_tokens, ρ = π / π_old (arXiv:1707.06347, equation 7).

    Args:
        logprobs: [n, c], of the policy that is trained.
        old_logprobs: [n, c], of the policy that sampled.
        advantages: [n, c].
        mask: [n, c], 1.0 on real tokens.
        cliprange: ε.
        num_tokens: real tokens of the whole mini-batch, of which these rows may be a part.

    Returns:
        A scalar.

    Example:
        >>> logprobs, advantages, mask = torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2)
        >>> policy_loss(logprobs, logprobs, advantages, mask, cliprange=0.2, num_tokens=2)
        tensor(-1.)
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    return -masked_mean(objective, mask, num_tokens)


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    cliprange: float,
    num_tokens: torch.Tensor | int,
) -> torch.Tensor:
    """½ Σ max((V − R)², (clip(V, V_old − ε, V_old + ε) − R)²) / num_tokens, the value loss of trlX and TRL.

    Args:
        values: [n, c], V of the critic that is trained.
        old_values: [n, c], V_old of the rollout.
        returns: [n, c], R.
        mask: [n, c], 1.0 on real tokens.
        cliprange: ε.
        num_tokens: real tokens of the whole mini-batch, of which these rows may be a part.

    Returns:
        A scalar.

    Example:
        >>> zeros, ones = torch.zeros(1, 2), torch.ones(1, 2)
        >>> value_loss(ones, zeros, zeros, ones, cliprange=0.2, num_tokens=2)
        tensor(0.5000)
    """
    clipped = torch.clamp(values, old_values - cliprange, old_values + cliprange)
    squared = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * masked_mean(squared, mask, num_tokens)


def policy(read: Reader, batch: Batch, options: Options, counts: Counts) -> Loss:
    """The actor's objective: the clipped surrogate, less the entropy bonus.

    Statistics: ``ratio_error``, the largest \\|ρ − 1\\|, 0 up to rounding before the first optimizer step.
    """
    ppo = options.ppo
    logprobs, entropies = read.logprobs(entropy=ppo.entropy_coef != 0)
    old = batch["old_logprobs"]
    loss = policy_loss(
        logprobs, old, batch["advantages"], batch.mask, cliprange=ppo.cliprange, num_tokens=counts.tokens
    )
    if entropies is not None:
        loss = loss - ppo.entropy_coef * masked_mean(entropies, batch.mask, counts.tokens)
    with torch.no_grad():
        ratio_error = (((logprobs - old).exp() - 1) * batch.mask).abs().max()
    return Loss(loss, maxima={"ratio_error": ratio_error})


def value(read: Reader, batch: Batch, options: Options, counts: Counts) -> Loss:
    """The critic's objective: the clipped squared error of the values."""
    ppo = options.ppo
    loss = value_loss(
        read.values(),
        batch["old_values"],
        batch["returns"],
        batch.mask,
        cliprange=ppo.cliprange_value,
        num_tokens=counts.tokens,
    )
    return Loss(ppo.vf_coef * loss)


def advantages(batch: Batch, options: Options, all_sum: AllSum = alone) -> dict[str, torch.Tensor]:
    """Clips the scores, and fills in ``advantages`` (whitened) and ``returns``.

    Returns:
        ``score``, the mean of the scores, and ``kl``, the mean over real tokens of log π − log π_ref: the k1 estimate
        of what is penalised, of the policy that sampled.
    """
    ppo = options.ppo
    old, reference, scores = batch["old_logprobs"], batch["reference_logprobs"], batch["scores"]
    if ppo.reward_clip is not None:
        scores.clamp_(-ppo.reward_clip, ppo.reward_clip)
    rewards = shaped_rewards(old, reference, scores, batch.mask, kl_coef=ppo.kl_coef)
    terminal = batch.columns.get("terminal_values")
    if terminal is not None and options.rollout.stop_token_id is not None:
        ended = (batch.completions * batch.mask == options.rollout.stop_token_id).any(1)
        terminal.mul_(~ended)
    estimates, batch["returns"] = gae(
        rewards, batch["old_values"], batch.mask, gamma=ppo.gamma, lam=ppo.lam, terminal_values=terminal
    )
    batch["advantages"] = whiten(estimates, batch.mask, all_sum=all_sum)
    count = batch.mask.sum()
    penalised = ((old - reference) * batch.mask).sum()
    sums = all_sum(torch.stack([scores.sum(), torch.ones_like(scores).sum(), penalised, count]))
    return {"score": sums[0] / sums[1], "kl": sums[2] / sums[3]}
