from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfkernels.algorithms.advantages import gae, shaped_rewards, whiten


def loop_gae(
    rewards: list[float], values: list[float], length: int, gamma: float, lam: float, terminal: float
) -> tuple[list[float], list[float]]:
    """Schulman et al., equation 16, backwards over one row, in Python's float64."""
    advantages = [0.0] * len(rewards)
    running = 0.0
    for t in reversed(range(length)):
        following = values[t + 1] if t + 1 < length else terminal
        running = rewards[t] + gamma * following - values[t] + gamma * lam * running
        advantages[t] = running
    returns = [a + v if t < length else 0.0 for t, (a, v) in enumerate(zip(advantages, values, strict=True))]
    return advantages, returns


def make_batch(c: int, lengths: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), c)
    mask = (torch.arange(c) < torch.tensor(lengths)[:, None]).double()
    rewards = torch.randn(shape, generator=generator, dtype=torch.float64) * mask
    return rewards, torch.randn(shape, generator=generator, dtype=torch.float64), mask


@settings(max_examples=30)
@given(
    c=st.integers(1, 300),
    gamma=st.sampled_from([1.0, 0.99, 0.5]),
    lam=st.sampled_from([0.95, 1.0, 0.0]),
    seed=st.integers(0, 99),
    terminal=st.booleans(),
)
def test_gae_equals_the_loop(c: int, gamma: float, lam: float, seed: int, terminal: bool) -> None:
    lengths = [c, max(1, c // 3), 1]
    rewards, values, mask = make_batch(c, lengths, seed)
    ends = torch.tensor([0.7, -0.3, 0.1], dtype=torch.float64)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, terminal_values=ends if terminal else None)
    for row, length in enumerate(lengths):
        expected = loop_gae(
            rewards[row].tolist(), values[row].tolist(), length, gamma, lam, ends[row].item() if terminal else 0.0
        )
        torch.testing.assert_close(advantages[row], torch.tensor(expected[0], dtype=torch.float64))
        torch.testing.assert_close(returns[row], torch.tensor(expected[1], dtype=torch.float64))


def test_what_stands_after_the_end_changes_nothing() -> None:
    rewards, values, mask = make_batch(9, [9, 4], 0)
    spoiled = torch.where(mask.bool(), values, torch.full_like(values, 1e6))
    for clean, dirty in zip(
        gae(rewards, values, mask, gamma=0.9, lam=0.9), gae(rewards, spoiled, mask, gamma=0.9, lam=0.9), strict=True
    ):
        torch.testing.assert_close(clean, dirty)


def test_whitening_equals_numpy_over_the_real_tokens() -> None:
    numpy = pytest.importorskip("numpy")
    _, values, mask = make_batch(7, [7, 3, 1], 3)
    values = values * 5 + 2
    real = values[mask.bool()].numpy()
    expected = (real - numpy.mean(real)) / numpy.sqrt(numpy.var(real) + 1e-8)
    whitened = whiten(values, mask)
    numpy.testing.assert_allclose(whitened[mask.bool()].numpy(), expected, rtol=1e-12)
    assert whitened[~mask.bool()].abs().sum() == 0


def test_the_score_sits_on_the_last_real_token_and_the_penalty_has_its_sign() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 0.0]], dtype=torch.float64)
    reference = torch.tensor([[-1.5, -1.0, -3.0], [-2.0, -1.0, -9.0]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    rewards = shaped_rewards(logprobs, reference, torch.tensor([10.0, 20.0]), mask, kl_coef=0.1)
    # -0.1 * (logp - ref) a token, by hand; +score on the last real one.
    expected = [[-0.05, 0.1, 10.0], [-0.1, 20.0, 0.0]]
    torch.testing.assert_close(rewards, torch.tensor(expected, dtype=torch.float64))
