from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhfkernels import Options
from rlhfkernels.algorithms.common import Counts
from rlhfkernels.algorithms.ppo import advantages, policy, policy_loss, value, value_loss
from rlhfkernels.data.batch import Batch


def test_the_policy_loss_by_hand() -> None:
    # Ratios 1.5 (clipped up, A > 0), 1.5 (not clipped, A < 0), 0.5 (not clipped, A > 0), 0.5 (clipped, A < 0), 1.1.
    ratios = [1.5, 1.5, 0.5, 0.5, 1.1]
    advantages = [2.0, -2.0, 2.0, -2.0, 1.0]
    terms = [1.2 * 2, 1.5 * -2, 0.5 * 2, 0.8 * -2, 1.1]
    logprobs = torch.tensor([[math.log(ratio) for ratio in ratios] + [5.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1.0] * 5 + [0.0]], dtype=torch.float64)
    loss = policy_loss(
        logprobs,
        torch.zeros_like(logprobs),
        torch.tensor([[*advantages, 9.0]], dtype=torch.float64),
        mask,
        cliprange=0.2,
        num_tokens=5,
    )
    torch.testing.assert_close(loss.item(), -sum(terms) / 5)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    # d(ρ A)/d log π = ρ A where the clip does not bind, else 0.
    expected = [0.0, -1.5 * -2 / 5, -0.5 * 2 / 5, 0.0, -1.1 / 5, 0.0]
    torch.testing.assert_close(gradient[0], torch.tensor(expected, dtype=torch.float64))


def test_the_value_loss_by_hand() -> None:
    # old 0, ε 0.2. V 0.5, R 1: clip to 0.2, worse -> 0.64. V 0.5, R 0: 0.25 against 0.04 -> 0.25. V 0.1, R 1: 0.81.
    values = torch.tensor([[0.5, 0.5, 0.1, 7.0]], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    loss = value_loss(values, torch.zeros_like(values), returns, mask, cliprange=0.2, num_tokens=3)
    torch.testing.assert_close(loss.item(), 0.5 * (0.64 + 0.25 + 0.81) / 3)
    (gradient,) = torch.autograd.grad(loss, values)
    expected = [0.0, 0.5 / 3, -0.9 / 3, 0.0]
    torch.testing.assert_close(gradient[0], torch.tensor(expected, dtype=torch.float64))


def test_the_objectives_cover_real_tokens_alone() -> None:
    """The second token is padding."""
    columns = {"old_logprobs": torch.zeros(1, 2), "advantages": torch.tensor([[2.0, 5.0]])}
    columns |= {"old_values": torch.tensor([[0.5, 3.0]]), "returns": torch.tensor([[1.0, 1.0]])}
    mask, tokens = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 3, dtype=torch.long)
    batch = Batch(tokens=tokens, attention_mask=None, mask=mask, prompt_len=1, num_rows=1, columns=columns)
    read = (torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 9.0]]))
    reader: Any = SimpleNamespace(values=lambda: torch.tensor([[0.5, 3.0]]), logprobs=lambda *, entropy: read)
    options, counts = Options.of({"ppo.entropy_coef": 0.1, "ppo.vf_coef": 2.0}), Counts(tokens=mask.sum(), rows=1)
    assert float(value(reader, batch, options, counts).value) == pytest.approx(2 * 0.5 * (0.5 - 1) ** 2)
    loss = policy(reader, batch, options, counts)
    assert float(loss.value) == pytest.approx(-2.0 - 0.1 * 0.5)
    assert float(loss.maxima["ratio_error"]) == 0


def test_the_kl_is_the_mean_difference_from_the_reference_over_real_tokens() -> None:
    columns = {
        "old_logprobs": torch.tensor([[-1.0, -2.0, 0.0]]),
        "reference_logprobs": torch.tensor([[-1.5, -1.75, -9.0]]),
        "old_values": torch.zeros(1, 3),
        "scores": torch.tensor([0.5]),
    }
    mask, tokens = torch.tensor([[1.0, 1.0, 0.0]]), torch.zeros(1, 4, dtype=torch.long)
    batch = Batch(tokens=tokens, attention_mask=None, mask=mask, prompt_len=1, num_rows=1, columns=columns)
    assert float(advantages(batch, Options())["kl"]) == pytest.approx((0.5 - 0.25) / 2)


def test_what_follows_the_last_token_has_a_value_only_where_a_completion_was_cut() -> None:
    """Rows: the stop token stands last; none came; it came early."""
    columns = {name: torch.zeros(3, 2) for name in ("old_logprobs", "reference_logprobs", "old_values")}
    columns |= {"scores": torch.zeros(3), "terminal_values": torch.full((3,), 5.0)}
    batch = Batch(
        tokens=torch.tensor([[7, 1, 7], [7, 1, 2], [1, 7, 0]]),
        attention_mask=None,
        mask=torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]]),
        prompt_len=1,
        num_rows=3,
        columns=columns,
    )
    options = {"rollout.stop_token_id": 7, "ppo.lam": 1.0, "ppo.gamma": 1.0, "ppo.bootstrap_truncated": True}
    advantages(batch, Options.of(options))
    assert batch["returns"].tolist() == [[0.0, 0.0], [5.0, 5.0], [0.0, 0.0]]
