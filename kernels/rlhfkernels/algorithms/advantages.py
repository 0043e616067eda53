"""Rewards, advantages and returns of a rollout.

Shapes: b = sequences, c = completion length. Masks are 1.0 on real completion tokens and 0.0 after the end.
"""

from __future__ import annotations

import torch

from rlhfkernels.algorithms.common import AllSum, alone

# Completion positions per triangular matmul in ``gae``; a [128, 128] float32 matrix takes 64 KiB.
_BLOCK = 128


def shaped_rewards(
    logprobs: torch.Tensor,
    reference_logprobs: torch.Tensor,
    scores: torch.Tensor,
    mask: torch.Tensor,
    *,
    kl_coef: float,
) -> torch.Tensor:
    """Per-token reward −β·(log π − log π_ref), plus the score on the last real token.

    RLHF Deciphered (arXiv:2404.08555), section 7.6.3, the KL penalty.

    Args:
        logprobs: [b, c], of the old policy.
        reference_logprobs: [b, c].
        scores: [b], the reward model's.
        mask: [b, c].
        kl_coef: β.

    Returns:
        [b, c]; 0 after the end.

    Example:
        >>> ones = torch.ones(1, 2)
        >>> shaped_rewards(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-2.0, -1.0]]), ones[:, 0], ones, kl_coef=0.1)
        tensor([[-0.1000,  1.0000]])
    """
    rewards = (reference_logprobs - logprobs) * kl_coef * mask
    last = (mask.sum(1) - 1).clamp_(min=0).long()[:, None]
    return rewards.scatter_add_(1, last, scores[:, None].to(rewards.dtype))


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    terminal_values: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438, equation 16), and returns = advantages + values.

    A_t = Σ_k (γλ)^k δ_{t+k}, δ_t = r_t + γ V_{t+1} − V_t, V = 0 after the end.

    Args:
        rewards: [b, c].
        values: [b, c]; the value of the state before token t.
        mask: [b, c].
        gamma: γ.
        lam: λ.
        terminal_values: [b], what V is after the last real token; ``None`` is 0.

    Returns:
        Advantages [b, c] and returns [b, c]; both 0 after the end.

    Example:
        >>> rewards, values, mask = torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 3), torch.ones(1, 3)
        >>> advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
        >>> advantages
        tensor([[0.2500, 0.5000, 1.0000]])
    """
    values = values * mask
    following = torch.zeros_like(values)
    following[:, :-1] = values[:, 1:]
    if terminal_values is not None:
        last = (mask.sum(1) - 1).clamp_(min=0).long()[:, None]
        following.scatter_(1, last, terminal_values[:, None].to(following.dtype))
    deltas = (rewards + gamma * following - values) * mask
    advantages = _discounted_sums(deltas, gamma * lam) * mask
    return advantages, advantages + values


def _discounted_sums(deltas: torch.Tensor, discount: float) -> torch.Tensor:
    """Σ_{k ≥ t} discount^{k − t} · deltas_k for every t, from the end backwards in blocks, [b, c]."""
    c = deltas.shape[1]
    size = min(_BLOCK, c)
    steps = torch.arange(size, device=deltas.device)
    distance = steps[:, None] - steps[None, :]
    powers = torch.full_like(distance, discount, dtype=deltas.dtype) ** distance.clamp(min=0)
    triangle = torch.where(distance >= 0, powers, torch.zeros_like(powers))
    reach = torch.full_like(steps, discount, dtype=deltas.dtype) ** (size - steps)
    sums = torch.empty_like(deltas)
    carry = torch.zeros_like(deltas[:, :1])
    for start in reversed(range(0, c, size)):
        stop = min(start + size, c)
        width = stop - start
        sums[:, start:stop] = deltas[:, start:stop] @ triangle[:width, :width] + carry * reach[size - width :]
        carry = sums[:, start : start + 1]
    return sums


def whiten(values: torch.Tensor, mask: torch.Tensor, *, eps: float = 1e-8, all_sum: AllSum = alone) -> torch.Tensor:
    """Subtracts the masked mean and divides by the masked standard deviation of the population.

    Args:
        values: [b, c].
        mask: [b, c].
        eps: added to the variance.
        all_sum: adds a tensor up over the ranks, so that both are over all of them; by default there is one.

    Returns:
        [b, c]; 0 after the end.

    Example:
        >>> whiten(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
        tensor([[-1.,  1.,  0.]])
    """
    total, count = all_sum(torch.stack([(values * mask).sum(), mask.sum().to(values.dtype)])).unbind()
    centred = (values - total / count) * mask
    variance = all_sum(centred.square().sum()) / count
    return centred * torch.rsqrt(variance + eps)
