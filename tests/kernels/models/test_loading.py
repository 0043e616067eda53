from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhfkernels import PRESETS, Case, ModelError, build_step
from rlhfkernels.models.loading import _fix_dynamic_rotary, load_model, load_tokenizer, with_attention

# What the models' publishers state, in parameters.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "gpt2": 124_439_808,
    "opt-1.3b": 1_315_758_080,
    "pythia-160m": 162_322_944,
    "pythia-1.4b": 1_414_647_808,
    "pythia-6.9b": 6_857_302_016,
    "llama-7b": 6_738_415_616,
    "llama-2-70b": 68_976_648_192,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_weights(name: str) -> None:
    preset = PRESETS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(preset.model_type, **preset.config))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_the_tiny_preset_is_a_llama_of_the_stated_shape() -> None:
    model = load_model(
        Case(method="hydra", model="tiny", prompt_len=2, completion_len=2, batch_size=1), seed=0, with_lm_head=True
    )
    config = model.trunk.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (256, 688, 8)
    assert (config.num_attention_heads, config.vocab_size) == (8, 8192)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox", "gpt2", "qwen2"])
def test_trunk_and_head_together_are_the_model(make_case: Callable[..., Case], architecture: str) -> None:
    case = make_case(architecture=architecture)
    loaded = load_model(case, seed=0, with_lm_head=True)
    whole = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float64).eval()
    tokens = torch.randint(48, (2, 9))
    with torch.no_grad():
        logits = loaded.lm_head(loaded.trunk(input_ids=tokens).last_hidden_state)
        torch.testing.assert_close(logits, whole(input_ids=tokens).logits)


@pytest.mark.parametrize("architecture", ["gemma2", "granite", "cohere", "hyperclovax", "mpt"])
def test_what_a_model_does_after_its_head_is_kept(make_case: Callable[..., Case], architecture: str) -> None:
    case = make_case(architecture=architecture)
    loaded = load_model(case, seed=0, with_lm_head=True)
    attention = loaded.attention  # transformers' own choice need not be right
    whole = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float64, attn_implementation=attention).eval()
    tokens = torch.randint(48, (2, 8))
    with torch.no_grad():
        logits = loaded.lm_head(loaded.trunk(input_ids=tokens).last_hidden_state)
        torch.testing.assert_close(logits, whole(input_ids=tokens).logits)


def test_an_attention_that_the_architecture_lacks_is_one_sentence(make_case: Callable[..., Case]) -> None:
    case = make_case(architecture="gemma2", engine__attn_implementation="sdpa")
    with pytest.raises(ModelError, match=r"has no sdpa attention: set engine\.attn_implementation to another"):
        load_model(case, seed=0, with_lm_head=True)


@pytest.mark.parametrize(
    ("architecture", "asked", "taken"),
    [
        ("gemma2", "auto", "eager"),
        ("gptj", "auto", "eager"),
        ("bloom", "auto", "eager"),
        ("llama", "auto", "sdpa"),
        ("llama", "eager", "eager"),
    ],
)
def test_auto_is_sdpa_where_the_architecture_has_it(
    make_case: Callable[..., Case], architecture: str, asked: str, taken: str
) -> None:
    step = build_step(make_case(architecture=architecture, engine__attn_implementation=asked))
    assert step.attention_used == taken
    step.run().check_finite()


def test_a_reward_model_of_another_architecture_is_named_beside_the_actors(
    make_case: Callable[..., Case], checkpoint: Callable[[str], str]
) -> None:
    step = build_step(make_case("full", rollout__reward_model=checkpoint("gemma2")))
    assert (step.trunk_used, step.attention_used) == ("fast, plain", "sdpa, eager")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_sdpa(name: str) -> None:
    preset = PRESETS[name]
    config = AutoConfig.for_model(preset.model_type, **preset.config)
    for field in ("num_hidden_layers", "n_layer"):
        if hasattr(config, field):
            setattr(config, field, 1)
    with torch.device("meta"):
        model = with_attention(name, AutoModelForCausalLM.from_config, config, asked="auto")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("architecture", ["recurrent_gemma", "xlstm", "falcon_h1", "lfm2"])
@pytest.mark.parametrize("with_weights", [True, False])
def test_recurrent_states_are_refused(make_case: Callable[..., Case], architecture: str, with_weights: bool) -> None:
    with pytest.raises(ModelError, match=r"keeps states beside keys and values") as caught:
        load_model(make_case(architecture=architecture), seed=0, with_lm_head=True, with_weights=with_weights)
    assert "\n" not in str(caught.value)


def test_random_weights_depend_on_the_seed_alone() -> None:
    case = Case(method="hydra", model="tiny", prompt_len=2, completion_len=2, batch_size=1)
    first, again, other = (load_model(case, seed=seed, with_lm_head=False) for seed in (0, 0, 1))
    weights = [next(iter(model.trunk.parameters())) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda folder: None, "could not be loaded"),
        (lambda folder: (folder / "config.json").write_text("{}"), "could not be loaded"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "could not be loaded"),
    ],
    ids=["empty folder", "empty config", "no weights"],
)
def test_a_folder_without_a_model_is_one_sentence(
    prepare: Callable[[Path], object], sentence: str, tmp_path: Path
) -> None:
    prepare(tmp_path)
    case = Case(method="hydra", model=str(tmp_path), prompt_len=4, completion_len=4, batch_size=1)
    with pytest.raises(ModelError, match=sentence) as caught:
        load_model(case, seed=0, with_lm_head=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", bytes(range(20)), b"\xff" * 8])
def test_weights_that_cannot_be_read_are_one_sentence(
    make_case: Callable[..., Case], tmp_path: Path, content: bytes
) -> None:
    case = make_case()
    shutil.copytree(case.model, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"^model '.*broken' could not be loaded: ") as caught:
        load_model(dataclasses.replace(case, model=str(tmp_path / "broken")), seed=0, with_lm_head=True)
    assert "\n" not in str(caught.value)


def test_a_preset_has_no_tokenizer() -> None:
    assert load_tokenizer("tiny") is None


def test_a_folder_without_a_tokenizer_is_one_sentence(make_case: Callable[..., Case]) -> None:
    with pytest.raises(ModelError, match="could not be loaded"):
        load_tokenizer(make_case().model)


def test_a_dynamic_rotary_embedding_is_a_plain_one_in_every_layer_type() -> None:
    one, each, other = torch.nn.Module(), torch.nn.Module(), torch.nn.Module()
    one.rope_type = "dynamic"
    each.rope_type = {"full_attention": "dynamic", "sliding_attention": "longrope"}
    other.rope_type = "longrope"
    _fix_dynamic_rotary(torch.nn.ModuleList([one, each, other, torch.nn.Linear(1, 1)]))
    assert one.rope_type == "default"
    assert each.rope_type == {"full_attention": "default", "sliding_attention": "longrope"}
    assert other.rope_type == "longrope"
