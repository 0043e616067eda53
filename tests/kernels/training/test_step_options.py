"""The options of a PPO step reach the weights that they are for, and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhfkernels import Case, build_step
from rlhfkernels.training.step import TrainingStep

Make = Callable[..., Case]
# The gradients are not clipped, so that their length counts. The rate is high enough for both clip ranges to bind.
BASE = {
    "optimizer__name": "sgd",
    "optimizer__learning_rate": 0.1,
    "optimizer__max_grad_norm": 1e9,
    "ppo__num_ppo_epochs": 2,
    "ppo__reward_clip": None,
}
BOTH = ("actor", "critic")


def weights_after(make_case: Make, **options: object) -> dict[str, list[torch.Tensor]]:
    """Trained weights by role after three updates on one rollout, in which the actor cannot reach the critic."""
    step = build_step(make_case("full", **BASE | options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in step.engine.base_parameters("reference"):  # else the KL is 0
            weight.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype), alpha=0.1)
    batch, _ = step.infer()
    for _ in range(3):
        step.update(batch)
    return {role: [p.detach() for p in found] for role, found in step.engine.parameters_of_role.items()}


@pytest.fixture(scope="module")
def default() -> dict[str, list[torch.Tensor]]:
    """``weights_after`` of the defaults, kept by the first test that asks."""
    return {}


@pytest.mark.parametrize(
    ("options", "roles"),
    [
        ({}, ()),
        ({"ppo__cliprange": 0.05}, ("actor",)),
        ({"ppo__cliprange_value": 0.01}, ("critic",)),
        ({"ppo__vf_coef": 0.5}, ("critic",)),
        ({"ppo__entropy_coef": 0.1}, ("actor",)),
        ({"ppo__kl_coef": 0.5}, BOTH),
        ({"ppo__gamma": 0.9}, BOTH),
        ({"ppo__lam": 0.5}, BOTH),
        ({"ppo__reward_clip": 0.01}, BOTH),
        ({"ppo__critic_learning_rate": 0.05}, ("critic",)),
        ({"optimizer__learning_rate": 0.05}, BOTH),
        ({"optimizer__learning_rate": 0.05, "ppo__critic_learning_rate": 0.1}, ("actor",)),
        ({"optimizer__weight_decay": 0.1}, BOTH),
        ({"optimizer__max_grad_norm": 1e-3}, BOTH),
        ({"optimizer__warmup_steps": 4}, BOTH),
        ({"optimizer__max_steps": 8}, BOTH),
    ],
    ids=str,
)
def test_an_option_changes_the_weights_that_it_is_for(
    make_case: Make, default: dict[str, list[torch.Tensor]], options: dict[str, object], roles: tuple[str, ...]
) -> None:
    if not default:
        default |= weights_after(make_case)
    found = weights_after(make_case, **options)
    changed = [
        role
        for role, weights in found.items()
        if not all(torch.equal(a, b) for a, b in zip(weights, default[role], strict=True))
    ]
    assert changed == list(roles)


def test_the_value_loss_is_multiplied_by_its_coefficient(make_case: Make) -> None:
    whole, half = (build_step(make_case("full", ppo__vf_coef=c)).run().to_dict()["critic_loss"] for c in (1.0, 0.5))
    assert whole != 0
    assert half == pytest.approx(whole / 2, rel=1e-6)


def test_the_entropy_bonus_and_its_gradient_are_those_of_a_reference(make_case: Make) -> None:
    step = build_step(make_case("full", ppo__entropy_coef=0.5))
    step.optimizers = {}  # gradients stay
    batch, _ = step.infer()
    stats = step.update(batch)
    model = AutoModelForCausalLM.from_pretrained(step.case.model, dtype=torch.float64).eval()
    logits = model(input_ids=batch.tokens).logits[:, batch.prompt_len - 1 : -1]
    logprobs = torch.log_softmax(logits, -1)
    taken = logprobs.gather(-1, batch.completions[..., None]).squeeze(-1)
    ratio = torch.exp(taken - taken.detach())
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    loss = -(ratio * batch["advantages"]).mean() - 0.5 * entropies.mean()
    loss.backward()
    assert float(stats.losses["actor"]) == pytest.approx(loss.item(), rel=1e-5)
    expected = dict(model.base_model.named_parameters())
    for name, weight in actor_weights(step):
        torch.testing.assert_close(weight.grad, expected[name].grad, rtol=1e-4, atol=1e-6)


def actor_weights(step: TrainingStep) -> list[tuple[str, torch.nn.Parameter]]:
    return list(step.engine.models["policy"].trunk.named_parameters())
