from __future__ import annotations

import dataclasses

import pytest

from rlhfkernels.config.options import Options
from rlhfkernels.methods.program import Role, WeightSet
from rlhfkernels.methods.table import METHODS, families

# Hydra-RLHF, Table 2: static models, LoRA weight sets.
TABLE_2 = {"full": (4, 0), "lora": (4, 2), "dynamic-lora": (2, 2), "joined-hydra": (1, 1), "hydra": (1, 2)}


@pytest.mark.parametrize("name", TABLE_2)
def test_the_papers_table_2_follows_from_the_role_tables(name: str) -> None:
    method = METHODS[name]
    assert (method.num_static_models, len(method.adapter_sets)) == TABLE_2[name]


@pytest.mark.parametrize(
    ("name", "num_score_passes", "update_roles"),
    [
        ("full", 3, [("actor",), ("critic",)]),
        ("lora", 3, [("actor",), ("critic",)]),
        ("dynamic-lora", 3, [("actor",), ("critic",)]),
        ("joined-hydra", 2, [("actor", "critic")]),
        ("hydra", 2, [("actor",), ("critic",)]),
    ],
)
def test_passes_are_as_few_as_the_table_allows(
    name: str, num_score_passes: int, update_roles: list[tuple[str, ...]]
) -> None:
    method = METHODS[name]
    assert len(method.score_passes) == num_score_passes
    assert [p.roles for p in method.update_passes] == update_roles


def test_hydra_scores_reference_and_reward_in_one_bare_pass() -> None:
    shared = next(p for p in METHODS["hydra"].score_passes if "reward" in p.roles)
    assert (shared.weights, shared.roles) == (WeightSet("hydra"), ("reference", "reward"))


def test_every_phase_is_inference_or_update_and_optimize_is_last() -> None:
    for method in (METHODS[name] for name in families()["PPO"]):
        assert [phase.kind for phase in method.phases[:2]] == ["inference", "inference"]
        assert {phase.kind for phase in method.phases[2:]} == {"update"}
        assert method.phases[-1].name == "optimize"


def test_only_bases_with_a_language_model_role_carry_its_head() -> None:
    lora = METHODS["lora"]
    assert [base for base in lora.bases if "lm" in lora.heads_of(base)] == ["policy", "reference"]


def test_a_frozen_critic_head_is_the_reward_head_where_the_base_is_shared() -> None:
    frozen = Options.of({"ppo.critic_head": "frozen"}).flat()
    shared = METHODS["hydra"].with_options(frozen).roles["critic"]
    assert shared.head == "reward"
    assert shared.trains == {"adapter"}
    apart = METHODS["lora"].with_options(frozen).roles["critic"]
    assert apart.head == "value"
    assert apart.trains == {"adapter"}


def test_a_sixth_method_is_a_row() -> None:
    hydra = METHODS["hydra"]
    roles = {**hydra.roles, "critic": Role(base="hydra", head="value", trains=frozenset({"head"}))}
    linear_critic = dataclasses.replace(hydra, name="hydra-linear-critic", roles=roles)
    assert len(linear_critic.adapter_sets) == 1
    assert [p.roles for p in linear_critic.score_passes] == [("reference", "critic", "reward")]
    assert [phase.name for phase in linear_critic.phases][2:] == ["update_actor", "update_critic", "optimize"]
