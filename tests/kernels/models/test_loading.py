from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rlhfkernels import PRESETS, Case, ModelError, build_step
from rlhfkernels.models import loading
from rlhfkernels.models.depth import alike_layers
from rlhfkernels.models.faults import forward_errors, loading_errors, running_errors
from rlhfkernels.models.loading import load_model, load_tokenizer, max_positions, read_config

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


@pytest.mark.parametrize("architecture", ["gemma2", "granite", "cohere", "hyperclovax", "mpt"])
def test_what_a_model_does_after_its_head_is_kept(make_case: Callable[..., Case], architecture: str) -> None:
    case = make_case(architecture=architecture)
    loaded = load_model(case, seed=0, with_lm_head=True)
    whole = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float64).eval()
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
    assert step.attention_taken == taken
    step.run().check_finite()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_sdpa(name: str) -> None:
    preset = PRESETS[name]
    config = AutoConfig.for_model(preset.model_type, **preset.config)
    for field in ("num_hidden_layers", "n_layer"):
        if hasattr(config, field):
            setattr(config, field, 1)
    with torch.device("meta"):
        model = loading.with_attention(name, AutoModelForCausalLM.from_config, config, asked="auto")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("architecture", ["recurrent_gemma", "xlstm", "falcon_h1", "lfm2"])
@pytest.mark.parametrize("with_weights", [True, False])
def test_recurrent_states_are_refused(make_case: Callable[..., Case], architecture: str, with_weights: bool) -> None:
    with pytest.raises(ModelError, match=r"keeps states beside keys and values") as caught:
        load_model(make_case(architecture=architecture), seed=0, with_lm_head=True, with_weights=with_weights)
    assert "\n" not in str(caught.value)


def test_a_multimodal_model_is_refused(make_case: Callable[..., Case]) -> None:
    with pytest.raises(ModelError, match=r"is multimodal \(gemma3\): it must read text alone\."):
        load_model(make_case(architecture="gemma3"), seed=0, with_lm_head=True)


def without(folder: str, to: Path, *names: str) -> str:
    """Copies a checkpoint without the named tensors."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    save_file({name: t for name, t in weights.items() if name not in names}, to / "model.safetensors", {"format": "pt"})
    return str(to)


def test_a_checkpoint_without_some_weights_is_refused(make_case: Callable[..., Case], tmp_path: Path) -> None:
    case = make_case()
    lacking = [f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in ("k", "q")]
    case = dataclasses.replace(case, model=without(case.model, tmp_path / "some", *lacking))
    sentence = rf"lacks weights: its checkpoint has no {', '.join(lacking[:3])} and 1 more\."
    with pytest.raises(ModelError, match=sentence):
        load_model(case, seed=0, with_lm_head=True)
    load_model(case, seed=0, with_lm_head=True, with_weights=False)


def test_a_head_may_be_absent_where_nothing_reads_it(make_case: Callable[..., Case], tmp_path: Path) -> None:
    case = make_case()
    case = dataclasses.replace(case, model=without(case.model, tmp_path / "headless", "lm_head.weight"))
    load_model(case, seed=0, with_lm_head=False)
    with pytest.raises(ModelError, match=r"lacks weights: its checkpoint has no lm_head\.weight\."):
        load_model(case, seed=0, with_lm_head=True)


def with_tensors(folder: str, to: Path, *names: str) -> str:
    """Copies a checkpoint and adds tensors of the given names."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    added = {name: torch.ones(32, dtype=torch.float64) for name in names}
    save_file(weights | added, to / "model.safetensors", {"format": "pt"})
    return str(to)


@pytest.mark.parametrize("with_lm_head", [True, False])
def test_a_checkpoint_with_weights_that_have_no_place_is_refused(
    make_case: Callable[..., Case], tmp_path: Path, with_lm_head: bool
) -> None:
    case = make_case()
    surplus = [f"model.layers.{layer}.self_attn.{name}_proj.bias" for layer in (0, 1) for name in ("k", "q")]
    case = dataclasses.replace(case, model=with_tensors(case.model, tmp_path / "more", *surplus, "score.weight"))
    sentence = (
        rf"has weights that LlamaForCausalLM has no place for: {', '.join(surplus[:3])} and 1 more; "
        r"its config\.json must describe its checkpoint\.$"
    )
    with pytest.raises(ModelError, match=sentence):
        load_model(case, seed=0, with_lm_head=with_lm_head)
    load_model(case, seed=0, with_lm_head=with_lm_head, with_weights=False)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("llama", "score.weight"),
        ("llama", "v_head.summary.bias"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.1.attention.masked_bias"),
        ("qwen2", "lm_head.weight"),  # tied
    ],
)
def test_tensors_that_no_forward_pass_misses_may_be_there(
    make_case: Callable[..., Case], tmp_path: Path, architecture: str, name: str
) -> None:
    case = make_case(architecture=architecture)
    copied = with_tensors(case.model, tmp_path / "more", name)
    if name == "lm_head.weight":
        weights = load_file(tmp_path / "more" / "model.safetensors")
        weights[name] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, tmp_path / "more" / "model.safetensors", {"format": "pt"})
    models = [
        load_model(dataclasses.replace(case, model=folder), seed=0, with_lm_head=True)
        for folder in (case.model, copied)
    ]
    pairs = zip(models[0].trunk.parameters(), models[1].trunk.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_bias_of_a_head_that_nothing_reads_may_be_there(make_case: Callable[..., Case], tmp_path: Path) -> None:
    case = make_case()
    case = dataclasses.replace(case, model=with_tensors(case.model, tmp_path / "bias", "lm_head.bias"))
    load_model(case, seed=0, with_lm_head=False)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM has no place for: lm_head\.bias;"):
        load_model(case, seed=0, with_lm_head=True)


def test_an_error_of_a_forward_pass_is_one_sentence() -> None:
    with (
        pytest.raises(ModelError, match=r"^model 'm' cannot be run: Net raised TypeError \(no such argument\)\.$"),
        forward_errors("m", "Net"),
    ):
        raise TypeError("no such argument\nand more")


def test_random_weights_depend_on_the_seed_alone() -> None:
    case = Case(method="hydra", model="tiny", prompt_len=2, completion_len=2, batch_size=1)
    first, again, other = (load_model(case, seed=seed, with_lm_head=False) for seed in (0, 0, 1))
    weights = [next(iter(model.trunk.parameters())) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "mixtral", "phimoe"])
def test_train_mode_is_not_random(make_case: Callable[..., Case], architecture: str) -> None:
    case = make_case(architecture=architecture, dtype="float32")
    trunk = load_model(case, seed=0, with_lm_head=True).trunk.train()
    tokens = torch.randint(48, (2, 8))
    with torch.no_grad():
        first, second = (trunk(input_ids=tokens).last_hidden_state for _ in range(2))
    assert torch.equal(first, second)


def test_a_models_own_train_mode_is_random(checkpoint: Callable[[str], str]) -> None:
    """The checkpoints of the test above have noise that loading turns off."""
    tokens = torch.randint(48, (2, 8))
    for architecture in ("gpt2", "bloom", "mixtral"):
        trunk = AutoModelForCausalLM.from_pretrained(checkpoint(architecture), dtype=torch.float32).train()
        with torch.no_grad():
            assert not torch.equal(trunk(input_ids=tokens).logits, trunk(input_ids=tokens).logits)


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


@pytest.mark.parametrize("with_weights", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 0},
        {"hidden_size": "x"},
        {"num_attention_heads": 3},
        {"num_attention_heads": 0},
        {"vocab_size": None},
        {"vocab_size": -5},
        {"hidden_act": "nope"},
        {"rope_parameters": 3},
    ],
    ids=str,
)
def test_a_config_with_nonsense_is_one_sentence(
    make_case: Callable[..., Case], tmp_path: Path, change: dict[str, object], with_weights: bool
) -> None:
    case = dataclasses.replace(make_case(), model=with_config(make_case().model, tmp_path / "nonsense", change))
    with pytest.raises(ModelError, match=r"^model '.*nonsense' could not be loaded: ") as caught:
        load_model(case, seed=0, with_lm_head=True, with_weights=with_weights)
    assert "\n" not in str(caught.value)


def with_config(folder: str, to: Path, change: dict[str, object]) -> str:
    """Copies a checkpoint and changes fields of its configuration."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | change))
    return str(to)


def test_the_layers_of_a_config_with_nonsense_are_one_sentence(make_case: Callable[..., Case], tmp_path: Path) -> None:
    case = make_case()
    case = dataclasses.replace(case, model=with_config(case.model, tmp_path / "nonsense", {"hidden_size": 0}))
    with pytest.raises(ModelError, match="could not be loaded"):
        alike_layers(case, case.model)


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


@pytest.mark.parametrize("content", [b"", b"GGUF\x03\0\0\0", bytes(100)])
def test_a_gguf_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"^model '.*m\.gguf' ") as caught:
        read_config(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["x", {}, float("inf"), [2.0, "x"]])
def test_a_field_that_no_architecture_checks_must_be_a_number(
    make_case: Callable[..., Case], tmp_path: Path, value: object
) -> None:
    case = make_case()
    change = {"final_logit_softcapping": value}
    case = dataclasses.replace(case, model=with_config(case.model, tmp_path / "nonsense", change))
    with pytest.raises(ModelError, match=r"final_logit_softcapping .* in its config: it must be a finite number\.$"):
        load_model(case, seed=0, with_lm_head=True)


def test_an_error_in_a_step_is_one_sentence_for_a_users_model_alone() -> None:
    with (
        pytest.raises(ModelError, match=r"^model './mine' cannot be run: no such width \(TypeError\)\.$"),
        running_errors(("tiny", "./mine")),
    ):
        raise TypeError("no such width\nand more")
    with pytest.raises(TypeError), running_errors(("tiny",)):
        raise TypeError("no such width")


@pytest.mark.parametrize("error", [MemoryError("x"), torch.OutOfMemoryError("x"), KeyboardInterrupt()])
def test_out_of_memory_while_loading_says_nothing_against_the_model(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, loading_errors("m"):
        raise error
    assert caught.value is error


def test_a_preset_has_no_tokenizer() -> None:
    assert load_tokenizer("tiny") is None


def test_a_folder_without_a_tokenizer_is_one_sentence(make_case: Callable[..., Case]) -> None:
    with pytest.raises(ModelError, match="could not be loaded"):
        load_tokenizer(make_case().model)
