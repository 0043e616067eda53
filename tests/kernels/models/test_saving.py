from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rlhfkernels import Case, build_step
from rlhfkernels.methods.program import WeightSet

NEAR = {"rtol": 1e-4, "atol": 1e-4}
ARCHITECTURES = ["llama", "opt", "gpt_neox", "gpt2", "qwen2", "mixtral", "gemma2"]  # qwen2 is tied


@pytest.mark.parametrize("trunk", ["fast", "plain"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_that_is_trained_whole_is_read_by_transformers(
    make_case: Callable[..., Case], architecture: str, trunk: str, tmp_path: Path
) -> None:
    case = make_case("sft", architecture, dtype="float32", engine__trunk=trunk, optimizer__learning_rate=0.05)
    step = build_step(case)
    for _ in range(2):
        step.run()
    step.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32).eval()
    original = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32).eval()
    tokens = torch.randint(48, (2, 11))
    with torch.no_grad():
        found, start = (torch.log_softmax(model(input_ids=tokens).logits, -1) for model in (loaded, original))
        hidden = step.engine.hidden(WeightSet("policy"), tokens, None)
        logprobs, _ = step.engine.logprobs("policy", hidden, tokens[:, 1:])
    torch.testing.assert_close(found[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1), logprobs, **NEAR)
    assert float((found - start).abs().max()) > 0.1  # training moved it


def test_actor_and_critic_of_full_ppo_are_two_models_and_a_head(make_case: Callable[..., Case], tmp_path: Path) -> None:
    step = build_step(make_case("full", optimizer__learning_rate=0.05))
    step.run()
    step.save(tmp_path)
    roles = {name: step.method.roles[name] for name in ("actor", "critic")}
    tokens = torch.randint(48, (2, 11))
    with torch.no_grad():
        actor = AutoModelForCausalLM.from_pretrained(tmp_path / roles["actor"].base, dtype=torch.float64)
        expected = step.engine.lm_head("actor")(step.engine.hidden(roles["actor"].weights, tokens, None))
        torch.testing.assert_close(actor(input_ids=tokens).logits, expected, **NEAR)
        critic = AutoModel.from_pretrained(tmp_path / roles["critic"].base, dtype=torch.float64)
        head = load_file(tmp_path / "critic_head.safetensors")["weight"]
        values = step.engine.scalar_heads["critic"](step.engine.hidden(roles["critic"].weights, tokens, None))
        torch.testing.assert_close((critic(input_ids=tokens).last_hidden_state @ head.T).squeeze(-1), values, **NEAR)
    frozen = {role.base for role in step.method.roles.values()} - {role.base for role in roles.values()}
    assert not any((tmp_path / base).exists() for base in frozen)


def test_a_saved_model_keeps_its_configuration(make_case: Callable[..., Case], tmp_path: Path) -> None:
    case = make_case("sft", "bloom")
    build_step(case).save(tmp_path)
    found, expected = (AutoConfig.from_pretrained(folder) for folder in (tmp_path / "policy", case.model))
    assert (found.hidden_dropout, found.attention_dropout) == (0.3, 0.3)
    differing = {key for key, value in expected.to_dict().items() if found.to_dict()[key] != value}
    assert differing <= {"_name_or_path", "dtype", "transformers_version", "architectures"}


def test_a_preset_in_bfloat16_is_saved_in_bfloat16(tmp_path: Path) -> None:
    case = Case(method="sft", model="tiny", prompt_len=2, completion_len=2, batch_size=1, dtype="bfloat16")
    step = build_step(case)
    step.run()
    step.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert loaded.dtype == torch.bfloat16
    pairs = zip(loaded.model.parameters(), step.engine.base_parameters("policy"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
