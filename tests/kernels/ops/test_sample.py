from __future__ import annotations

import pytest
import torch

from rlhfkernels.ops.sample import sample, sample_reference


def test_frequencies_are_the_softmax() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    draws = 40_000
    tokens, _ = sample(logits.repeat(draws, 1), torch.Generator().manual_seed(0))
    found = torch.bincount(tokens, minlength=4) / draws
    expected = torch.softmax(logits, 0)
    # Five standard deviations of a frequency.
    bound = 5 * (expected * (1 - expected) / draws).sqrt()
    assert ((found - expected).abs() < bound).all()


@pytest.mark.parametrize("size", [1, 5, 300])
def test_tokens_and_logprobs_equal_the_reference(size: int) -> None:
    logits = 2 * torch.randn(64, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = sample_reference(logits, torch.Generator().manual_seed(2))
    tokens, logprobs = sample(logits.clone(), torch.Generator().manual_seed(2))
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logprobs, expected[1])
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1).gather(1, tokens[:, None]).squeeze(1))


def test_the_seed_determines_the_tokens() -> None:
    logits = torch.randn(20, 9, generator=torch.Generator().manual_seed(1))
    first, _ = sample(logits.clone(), torch.Generator().manual_seed(3))
    second, _ = sample(logits.clone(), torch.Generator().manual_seed(3))
    other, _ = sample(logits.clone(), torch.Generator().manual_seed(4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_token_of_probability_0_is_never_sampled() -> None:
    logits = torch.full((4000, 6), float("-inf"))
    logits[:, 2] = 0.0
    logits[:, 4] = 1.0
    tokens, logprobs = sample(logits, torch.Generator().manual_seed(0))
    assert set(tokens.tolist()) == {2, 4}
    assert logprobs.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_of_probability_0_that_rounding_draws_has_a_finite_log_probability(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """The sums of torch's scan on CUDA may rise there."""
    monkeypatch.setattr(torch, "searchsorted", lambda sums, thresholds, right: torch.zeros_like(thresholds).long())
    logits = torch.tensor([[float("-inf"), 0.0]], dtype=dtype)
    tokens, logprobs = sample(logits, None, backend="torch")
    assert tokens.tolist() == [0]
    assert logprobs.isfinite().all()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 37, 99])
def test_logits_that_are_not_finite_give_a_token_and_no_number(backend: str, bad: float, where: int) -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    logits[1, where] = bad
    tokens, logprobs = sample(logits, torch.Generator().manual_seed(2), backend=backend)
    assert ((tokens >= 0) & (tokens < 100)).all()
    assert logprobs.isnan().tolist() == [False, True, False]
