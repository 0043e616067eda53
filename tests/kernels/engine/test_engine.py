from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM

from rlhfkernels import METHODS, Case, CaseError, ModelError, NumericalError, Observer, build_step
from rlhfkernels.data.batch import Batch
from rlhfkernels.engine.engine import Engine, logprob_chunk_size
from rlhfkernels.methods.program import WeightSet
from rlhfkernels.methods.table import families
from rlhfkernels.training.step import TrainingStep

Generated = Callable[[TrainingStep], Batch]
PPO = families()["PPO"]
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kv_cache", ["static", "dynamic"])
def test_log_probabilities_kept_while_sampling_are_those_of_a_full_forward(
    make_case: Callable[..., Case],
    generated: Generated,
    architecture: str,
    kv_cache: str,
    shake: Callable[[Engine], None],
) -> None:
    step = build_step(make_case(architecture=architecture, engine__cache_implementation=kv_cache))
    shake(step.engine)
    rollout = generated(step)
    with torch.no_grad():
        hidden = step.engine.hidden(WeightSet("hydra", "actor"), rollout.tokens, None)
        expected, _ = step.engine.logprobs("actor", hidden, rollout.completions)
    torch.testing.assert_close(rollout["old_logprobs"].double(), expected, rtol=1e-6, atol=1e-6)


def test_a_temperature_divides_the_logits_of_every_log_probability(make_case: Callable[..., Case]) -> None:
    step = build_step(make_case(rollout__temperature=2.0))
    rollout = scored(step)
    model = AutoModelForCausalLM.from_pretrained(step.case.model, dtype=torch.float64).eval()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=rollout.tokens).logits / 2.0, -1)[:, :-1]
    expected = logprobs.gather(-1, rollout.tokens[:, 1:, None]).squeeze(-1)[:, rollout.prompt_len - 1 :]
    for found in (rollout["old_logprobs"], rollout["reference_logprobs"]):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_from_padded_prompts_equals_generation_without_padding(
    make_case: Callable[..., Case], architecture: str, shake: Callable[[Engine], None]
) -> None:
    engine = Engine(make_case(architecture=architecture))
    shake(engine)
    decode = engine.trunks["hydra"].decoder
    torch.manual_seed(5)
    tokens = torch.randint(48, (1, 3))
    following = torch.randint(48, (1, 2))
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), tokens], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    alone, together = decode("actor", 5, Observer()), decode("actor", 7, Observer())
    torch.testing.assert_close(together.advance(padded, mask[:, :5]), alone.advance(tokens, None))
    for t in range(2):
        token = following[:, t : t + 1]
        torch.testing.assert_close(together.advance(token, mask[:, : 6 + t]), alone.advance(token, None))


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


def test_a_reward_models_positions_must_suffice(
    make_case: Callable[..., Case], checkpoint: Callable[[str], str]
) -> None:
    with pytest.raises(ModelError, match=r"is 11: model '.*short-reward\d*' has 8 positions at most\."):
        Engine(make_case("lora", rollout__reward_model=checkpoint("short-reward")))


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


def test_a_completion_stops_at_the_stop_token_and_is_masked_after_it(
    make_case: Callable[..., Case], generated: Generated
) -> None:
    step = build_step(make_case(batch_size=16, completion_len=12, rollout__stop_token_id=7))
    rollout = generated(step)
    stopped = 0
    for tokens, mask, logprobs in zip(rollout.completions, rollout.mask, rollout["old_logprobs"], strict=True):
        length = int(mask.sum())
        assert torch.equal(mask, (torch.arange(12) < length).float())
        assert not (tokens[: length - 1] == 7).any()
        assert (logprobs[length:] == 0).all()
        assert (tokens[length:] == 0).all()
        if length < 12:
            stopped += 1
            assert tokens[length - 1] == 7
    assert stopped > 0


def test_generation_ends_when_every_row_has(make_case: Callable[..., Case], generated: Generated) -> None:
    step = build_step(make_case(batch_size=2, completion_len=50, prompt_len=4, rollout__stop_token_id=7))
    with torch.no_grad():
        step.engine.lm_head("actor").weight[7] = 0
        step.engine.models["hydra"].trunk.norm.weight.zero_()  # all logits 0: any token, soon 7
    rollout = generated(step)
    ends = rollout.mask.sum(1)
    assert (ends >= 1).all()


@pytest.mark.parametrize(
    ("trunk", "backend", "dtype"),
    [("plain", "torch", "float64"), ("fast", "torch", "float32"), ("fast", "auto", "float32")],
)
@pytest.mark.parametrize("stop", [None, 7])
def test_sampling_from_logits_that_are_not_finite_is_one_error(
    make_case: Callable[..., Case], trunk: str, backend: str, dtype: str, stop: int | None
) -> None:
    options = {"engine__trunk": trunk, "engine__backend": backend, "rollout__stop_token_id": stop}
    step = build_step(make_case(dtype=dtype, **options))
    step.engine.lm_head("actor").weight.data[5, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"^actor sampled from logits that are not finite"):
        step.run()


@pytest.mark.parametrize("trunk", ["plain", "fast"])
def test_looking_seldom_whether_all_have_ended_changes_no_batch(
    make_case: Callable[..., Case],
    generated: Callable[[TrainingStep], Batch],
    monkeypatch: pytest.MonkeyPatch,
    trunk: str,
) -> None:
    case = make_case(completion_len=40, batch_size=1, engine__trunk=trunk)
    stop = int(generated(build_step(case)).completions[0, 3])
    case = dataclasses.replace(case, options=case.options.replace({"rollout.stop_token_id": stop}))
    every = generated(build_step(case))
    assert 1 <= every.mask.sum() <= 4
    looks: list[int] = []
    monkeypatch.setattr("rlhfkernels.engine.engine._tokens_between_looks", lambda device: looks.append(1) or 16)
    seldom = generated(build_step(case))
    assert looks
    for name in ("tokens", "mask"):
        assert torch.equal(getattr(seldom, name), getattr(every, name))
    assert torch.equal(seldom["old_logprobs"], every["old_logprobs"])


@pytest.mark.parametrize(
    ("device", "asked", "vocab_size", "expected"),
    [
        ("cpu", None, 32000, 128),
        ("cpu", 7, 32000, 7),
        ("cuda", None, 32000, 1024),
        ("cuda:1", None, 151936, 441),
        ("cuda", None, 2**30, 128),
        ("cuda", 0, 32000, 0),
        ("cuda", 128, 32000, 128),
    ],
)
def test_the_chunk_of_the_head_follows_the_device(
    make_case: Callable[..., Case], device: str, asked: int | None, vocab_size: int, expected: int
) -> None:
    case = make_case(device=device, engine__logprob_chunk_size=asked)
    assert logprob_chunk_size(case, vocab_size) == expected
