from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, GraniteConfig

from rlhfkernels import PRESETS, Case, ModelError, Options
from rlhfkernels.models.loading import load_model, load_tokenizer, max_positions

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


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_positions_are_its_configurations(name: str) -> None:
    preset = PRESETS[name]
    assert max_positions(AutoConfig.for_model(preset.model_type, **preset.config)) == preset.max_positions


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


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=48,
            max_position_embeddings=64,
            final_logit_softcapping=3.0,
            initializer_range=0.3,
        ),
        GraniteConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=48,
            max_position_embeddings=64,
            logits_scaling=4.0,
            initializer_range=0.3,
        ),
    ],
    ids=["softcap", "scaling"],
)
def test_what_a_model_does_after_its_head_is_kept(config: object, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").eval()
    whole.save_pretrained(tmp_path)
    case = Case(
        method="hydra",
        model=str(tmp_path),
        prompt_len=4,
        completion_len=4,
        batch_size=1,
        dtype="float64",
        options=Options.of({"engine.attn_implementation": "eager"}),
    )
    loaded = load_model(case, seed=0, with_lm_head=True)
    tokens = torch.randint(48, (2, 8))
    with torch.no_grad():
        logits = loaded.lm_head(loaded.trunk(input_ids=tokens).last_hidden_state)
        torch.testing.assert_close(logits, whole(input_ids=tokens).logits)


def test_an_attention_that_the_architecture_lacks_is_one_sentence(tmp_path: Path) -> None:
    config = Gemma2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=48
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    case = Case(method="hydra", model=str(tmp_path), prompt_len=4, completion_len=4, batch_size=1)
    with pytest.raises(ModelError, match=r"has no sdpa attention: set engine\.attn_implementation to another"):
        load_model(case, seed=0, with_lm_head=True)


def test_random_weights_depend_on_the_seed_alone() -> None:
    case = Case(method="hydra", model="tiny", prompt_len=2, completion_len=2, batch_size=1)
    first, again, other = (load_model(case, seed=seed, with_lm_head=False) for seed in (0, 0, 1))
    weights = [next(iter(model.trunk.parameters())) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_dropout_is_off_in_train_mode_too(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=48)
    assert config.resid_pdrop > 0
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    case = Case(method="hydra", model=str(tmp_path), prompt_len=4, completion_len=4, batch_size=1)
    trunk = load_model(case, seed=0, with_lm_head=True).trunk
    tokens = torch.randint(48, (2, 8))
    with torch.no_grad():
        assert torch.equal(trunk.train()(tokens).last_hidden_state, trunk.eval()(tokens).last_hidden_state)


def test_a_length_beyond_the_positions_is_one_sentence(make_case: Callable[..., Case]) -> None:
    with pytest.raises(ModelError, match=r"prompt_len \+ completion_len is 106: model '.*' has 64 positions at most\."):
        load_model(make_case(prompt_len=100), seed=0, with_lm_head=True)


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


def test_a_preset_has_no_tokenizer() -> None:
    assert load_tokenizer("tiny") is None


def test_a_folder_without_a_tokenizer_is_one_sentence(make_case: Callable[..., Case]) -> None:
    with pytest.raises(ModelError, match="could not be loaded"):
        load_tokenizer(make_case().model)
