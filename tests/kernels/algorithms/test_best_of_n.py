"""Best-of-n against enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhfkernels import Case, build_step
from rlhfkernels.algorithms.best_of_n import expected_best, kl_bound


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=7), st.integers(1, 7))
def test_the_expected_best_is_the_mean_over_all_subsets(scores: list[float], n: int) -> None:
    n = min(n, len(scores))
    subsets = [max(subset) for subset in itertools.combinations(scores, n)]
    found = expected_best(torch.tensor(scores, dtype=torch.float64), n)
    assert float(found) == pytest.approx(sum(subsets) / len(subsets), abs=1e-9)


def test_a_sample_that_is_ruled_out_counts_for_nothing() -> None:
    assert float(expected_best(torch.tensor([-math.inf, 0.0, 1.0]), 2)) == pytest.approx(2 / 3)


def test_more_samples_than_there_are_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"n is 4: it must be from 1 to the 3 scores of a prompt\."):
        expected_best(torch.zeros(2, 3), 4)


def test_the_bound_is_that_of_the_literature() -> None:
    assert [round(kl_bound(n), 2) for n in (4, 8, 16, 32, 64)] == [0.64, 1.2, 1.84, 2.5, 3.17]


def test_the_bound_is_reached_by_a_policy_without_ties() -> None:
    """Over a uniform policy on m outcomes, P(best = i) = (i/m)^n − ((i−1)/m)^n; its KL tends to the bound."""
    m, n = 20_000, 4
    probabilities = [(i / m) ** n - ((i - 1) / m) ** n for i in range(1, m + 1)]
    assert sum(p * math.log(p * m) for p in probabilities) == pytest.approx(kl_bound(n), abs=1e-3)


def test_a_step_keeps_the_best_sample_of_every_prompt(make_case: Callable[..., Case]) -> None:
    step = build_step(make_case("best-of-n", best_of_n__num_generations=3, batch_size=2, dtype="float32"))
    batch, stats = step.infer()
    assert batch.tokens.shape == (6, 11)
    assert torch.equal(batch.tokens[:3, :5], batch.tokens[:1, :5].expand(3, -1))
    assert not torch.equal(batch.completions[0], batch.completions[1])
    scores = batch["scores"].view(2, 3)
    assert torch.equal(scores.gather(1, batch["best"][:, None])[:, 0], scores.max(1).values)
    assert float(stats["best_score"]) == pytest.approx(float(scores.max(1).values.mean()))
    assert float(stats["score"]) == pytest.approx(float(scores.mean()))
    assert float(stats["kl_bound"]) == pytest.approx(kl_bound(3))
    assert step.trained_parameters() == []
    assert [phase.name for phase in step.phases] == ["generate", "score"]


def test_one_sample_is_plain_sampling(make_case: Callable[..., Case]) -> None:
    stats = build_step(make_case("best-of-n", best_of_n__num_generations=1)).run()
    assert float(stats["best_score"]) == pytest.approx(float(stats["score"]))
    assert float(stats["kl_bound"]) == 0.0


def test_micro_batches_change_no_score(make_case: Callable[..., Case]) -> None:
    found = []
    for micro in (None, 1):
        batch, _ = build_step(make_case("best-of-n", engine__micro_batch_size=micro)).infer()
        found.append(batch["scores"])
    torch.testing.assert_close(found[0], found[1])


def test_a_reward_function_scores_every_sample(make_case: Callable[..., Case]) -> None:
    step = build_step(make_case("best-of-n", batch_size=2), reward_fn=lambda batch: torch.arange(8.0))
    batch, stats = step.infer()
    assert batch["best"].tolist() == [3, 3]
    assert float(stats["best_score"]) == 5.0
