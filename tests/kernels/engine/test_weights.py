from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlhfkernels import METHODS, Case, CaseError, ModelError
from rlhfkernels.engine.engine import Engine
from rlhfkernels.methods.table import families

PPO = families()["PPO"]


@pytest.mark.parametrize("method", PPO)
def test_the_critics_head_starts_as_a_copy_that_owns_its_storage(make_case: Callable[..., Case], method: str) -> None:
    heads = Engine(make_case(method)).scalar_heads
    assert torch.equal(heads["critic"].weight, heads["reward"].weight)
    assert heads["critic"].weight.data_ptr() != heads["reward"].weight.data_ptr()
    assert heads["critic"].weight.requires_grad
    assert not heads["reward"].weight.requires_grad


def test_a_frozen_critic_head_is_shared_where_the_base_is(make_case: Callable[..., Case]) -> None:
    shared = Engine(make_case(ppo__critic_head="frozen")).scalar_heads
    assert shared["critic"] is shared["reward"]
    apart = Engine(make_case("lora", ppo__critic_head="frozen")).scalar_heads
    assert not apart["critic"].weight.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_bases_of_one_origin_start_equal_and_only_language_models_carry_the_head(
    make_case: Callable[..., Case], method: str
) -> None:
    engine = Engine(make_case(method))
    table = engine.method
    for base, model in engine.models.items():
        assert (model.lm_head is not None) == ("lm" in table.heads_of(base))
    storages = [p.data_ptr() for base in table.bases for p in engine.base_parameters(base)]
    assert len(storages) == len(set(storages))
    for first in table.bases:
        for second in table.bases:
            if table.origins[first] == table.origins[second]:
                pairs = zip(engine.base_parameters(first), engine.base_parameters(second), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)


def test_a_reward_model_with_other_tokens_is_one_sentence(
    make_case: Callable[..., Case], checkpoint: Callable[[str], str]
) -> None:
    case = make_case("lora", rollout__reward_model=checkpoint("other-words"))
    with pytest.raises(CaseError, match=r"other-words\d*' with a vocabulary of 50: .* which has 48\.$"):
        Engine(case)


def test_a_stop_token_beyond_the_vocabulary_is_one_sentence(make_case: Callable[..., Case]) -> None:
    Engine(make_case("lora", rollout__stop_token_id=47))
    with pytest.raises(
        CaseError, match=r"^rollout\.stop_token_id is 48: it must be below 48, the vocabulary of model '"
    ):
        Engine(make_case("lora", rollout__stop_token_id=48))
    Engine(make_case("sft", rollout__stop_token_id=48))  # it samples nothing


def test_a_reward_models_positions_must_suffice(
    make_case: Callable[..., Case], checkpoint: Callable[[str], str]
) -> None:
    with pytest.raises(ModelError, match=r"is 11: model '.*short-reward\d*' has 8 positions at most\."):
        Engine(make_case("lora", rollout__reward_model=checkpoint("short-reward")))
