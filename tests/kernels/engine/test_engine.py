from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM

from rlhfkernels import Case, build_step
from rlhfkernels.data.batch import Batch
from rlhfkernels.engine.engine import Engine
from rlhfkernels.methods.program import WeightSet
from rlhfkernels.training.step import TrainingStep

ARCHITECTURES = ["llama", "opt", "gpt_neox", "gpt2", "qwen2"]


def scored(step: TrainingStep) -> Batch:
    return step.infer()[0]


def test_hydras_one_pass_equals_two_separate_models(
    make_case: Callable[..., Case], shake: Callable[[Engine], None]
) -> None:
    step = build_step(make_case(ppo__reward_clip=None))
    shake(step.engine)
    rollout = scored(step)
    model = AutoModelForCausalLM.from_pretrained(step.case.model, dtype=torch.float64).eval()
    trunk = AutoModel.from_pretrained(step.case.model, dtype=torch.float64).eval()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=rollout.tokens).logits, -1)[:, :-1]
        expected = logprobs.gather(-1, rollout.tokens[:, 1:, None]).squeeze(-1)[:, rollout.prompt_len - 1 :]
        last = trunk(input_ids=rollout.tokens).last_hidden_state[:, -1]
        scores = (last @ step.engine.scalar_heads["reward"].weight.T).squeeze(-1)
    torch.testing.assert_close(rollout["reference_logprobs"].double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rollout["scores"].double(), scores, rtol=1e-6, atol=1e-6)


def test_a_temperature_divides_the_logits_of_every_log_probability(make_case: Callable[..., Case]) -> None:
    step = build_step(make_case(rollout__temperature=2.0))
    rollout = scored(step)
    model = AutoModelForCausalLM.from_pretrained(step.case.model, dtype=torch.float64).eval()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=rollout.tokens).logits / 2.0, -1)[:, :-1]
    expected = logprobs.gather(-1, rollout.tokens[:, 1:, None]).squeeze(-1)[:, rollout.prompt_len - 1 :]
    for found in (rollout["old_logprobs"], rollout["reference_logprobs"]):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["sft", "dpo-lora"])
def test_a_temperature_changes_no_loss_of_given_completions(make_case: Callable[..., Case], method: str) -> None:
    plain, hot = (build_step(make_case(method, rollout__temperature=t)).run().to_dict() for t in (1.0, 2.0))
    assert plain == hot


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_changes_no_number(
    make_case: Callable[..., Case], architecture: str, shake: Callable[[Engine], None]
) -> None:
    """A batch of mixed lengths gives what each row gives alone: hidden states, log-probabilities, values, scores."""
    engine = Engine(make_case(architecture=architecture))
    shake(engine)
    lengths, p, c = [3, 5, 1], 5, 4
    torch.manual_seed(5)
    tokens = torch.randint(48, (3, p + c))
    mask = (torch.arange(p + c) >= (p - torch.tensor(lengths))[:, None]).long()
    batch = rollout_of(tokens, mask, p)
    for role, spec in engine.method.roles.items():
        with torch.no_grad():
            together = engine.hidden(spec.weights, tokens, mask)
            for row, length in enumerate(lengths):
                alone = rollout_of(tokens[row : row + 1, p - length :], None, length)
                hidden = engine.hidden(spec.weights, alone.tokens, None)
                torch.testing.assert_close(together[row : row + 1, p - length :], hidden)
                if spec.head == "lm":
                    found = engine.logprobs(role, together, batch.completions)[0][row]
                    torch.testing.assert_close(found, engine.logprobs(role, hidden, alone.completions)[0][0])
                else:
                    found = engine.values(role, together, batch)[row]
                    torch.testing.assert_close(found, engine.values(role, hidden, alone)[0])
                    last = engine.last_scalar(role, together, batch)[row]
                    torch.testing.assert_close(last, engine.last_scalar(role, hidden, alone)[0])


def rollout_of(tokens: torch.Tensor, mask: torch.Tensor | None, prompt_len: int) -> Batch:
    b, c = tokens.shape[0], tokens.shape[1] - prompt_len
    return Batch(tokens=tokens, attention_mask=mask, mask=torch.ones(b, c), prompt_len=prompt_len, num_rows=b)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_actors_gradient_is_that_of_a_model_with_this_adapter_only(
    make_case: Callable[..., Case], checkpointing: bool, shake: Callable[[Engine], None]
) -> None:
    step = build_step(make_case(engine__gradient_checkpointing=checkpointing, lora__alpha=2.1))
    engine = step.engine
    shake(engine)
    rollout = scored(step)  # switches off and to the critic before the actor's forward
    hidden = engine.hidden(WeightSet("hydra", "actor"), rollout.tokens, None, train=True)
    engine.logprobs("actor", hidden, rollout.completions)[0].sum().backward()

    alone = AutoModelForCausalLM.from_pretrained(step.case.model, dtype=torch.float64).eval()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    alone = get_peft_model(alone, LoraConfig(r=3, lora_alpha=2.1, target_modules=targets), autocast_adapter_dtype=False)
    theirs = [p for name, p in alone.named_parameters() if "lora_" in name]
    ours = engine.adapters["hydra"].parameters("actor")
    assert len(theirs) == len(ours)
    with torch.no_grad():
        for a, b in zip(theirs, ours, strict=True):
            a.copy_(b)
    logprobs = torch.log_softmax(alone(input_ids=rollout.tokens).logits, -1)[:, rollout.prompt_len - 1 : -1]
    logprobs.gather(-1, rollout.completions[..., None]).sum().backward()
    for a, b in zip(theirs, ours, strict=True):
        # Transformers' RMS norm rounds to float32 even in float64, ours does not.
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in engine.adapters["hydra"].parameters("critic"))


def test_saved_adapters_name_the_model_that_they_are_for(
    make_case: Callable[..., Case], checkpoint: Callable[[str], str], tmp_path: Path
) -> None:
    case = make_case("dynamic-lora", rollout__reward_model=checkpoint("small-reward"))
    Engine(case).save(tmp_path)
    named = {
        name: json.loads((tmp_path / name / "adapter_config.json").read_text())["base_model_name_or_path"]
        for name in ("actor", "critic")
    }
    assert named == {"actor": case.model, "critic": case.options.rollout.reward_model}
