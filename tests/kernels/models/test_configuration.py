from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhfkernels import PRESETS, Case, ModelError
from rlhfkernels.models.configuration import max_positions, pretrained, read_config, rotary_limit
from rlhfkernels.models.depth import alike_layers
from rlhfkernels.models.loading import load_model


def with_config(folder: str, to: Path, change: dict[str, object]) -> str:
    """Copies a checkpoint and changes fields of its configuration."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | change))
    return str(to)


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_positions_are_its_configurations(name: str) -> None:
    preset = PRESETS[name]
    assert max_positions(AutoConfig.for_model(preset.model_type, **preset.config)) == preset.max_positions


def test_a_number_below_0_is_no_limit_of_positions() -> None:
    assert max_positions(AutoConfig.for_model("xlnet")) is None
    assert max_positions(SimpleNamespace(max_position_embeddings=-1, n_positions=16)) == 16


def test_a_multimodal_model_is_refused(make_case: Callable[..., Case]) -> None:
    with pytest.raises(ModelError, match=r"is multimodal \(gemma3\): it must read text alone\."):
        load_model(make_case(architecture="gemma3"), seed=0, with_lm_head=True)


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "dbrx", "mixtral"])
def test_train_mode_is_not_random(make_case: Callable[..., Case], architecture: str) -> None:
    case = make_case(architecture=architecture, dtype="float32")
    trunk = load_model(case, seed=0, with_lm_head=True).trunk.train()
    tokens = torch.randint(48, (2, 8))
    with torch.no_grad():
        first, second = (trunk(input_ids=tokens).last_hidden_state for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "dbrx", "mixtral", "phimoe"])
def test_what_is_turned_off_changes_no_number_of_eval_mode(
    make_case: Callable[..., Case], checkpoint: Callable[[str], str], architecture: str
) -> None:
    """PhiMoE's router reads a field that is called noise in eval mode too."""
    tokens = torch.randint(48, (2, 8))
    own = AutoModelForCausalLM.from_pretrained(checkpoint(architecture), dtype=torch.float32).eval()
    loaded = load_model(make_case(architecture=architecture, dtype="float32"), seed=0, with_lm_head=True)
    with torch.no_grad():
        found = loaded.trunk(input_ids=tokens).last_hidden_state
        torch.testing.assert_close(found, own.base_model(input_ids=tokens).last_hidden_state)


def test_a_models_own_train_mode_is_random(checkpoint: Callable[[str], str]) -> None:
    """The checkpoints of the test above have noise that loading turns off."""
    tokens = torch.randint(48, (2, 8))
    for architecture in ("gpt2", "bloom", "dbrx", "mixtral"):
        trunk = AutoModelForCausalLM.from_pretrained(checkpoint(architecture), dtype=torch.float32).train()
        with torch.no_grad():
            assert not torch.equal(trunk(input_ids=tokens).logits, trunk(input_ids=tokens).logits)


def test_a_length_beyond_the_positions_is_one_sentence(make_case: Callable[..., Case]) -> None:
    with pytest.raises(ModelError, match=r"prompt_len \+ completion_len is 106: model '.*' has 64 positions at most\."):
        load_model(make_case(prompt_len=100), seed=0, with_lm_head=True)


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


def test_the_layers_of_a_config_with_nonsense_are_one_sentence(make_case: Callable[..., Case], tmp_path: Path) -> None:
    case = make_case()
    case = dataclasses.replace(case, model=with_config(case.model, tmp_path / "nonsense", {"hidden_size": 0}))
    with pytest.raises(ModelError, match="could not be loaded"):
        alike_layers(case, case.model)


def test_a_model_in_the_home_directory_is_read(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[[str], str]
) -> None:
    folder = Path(checkpoint("llama"))
    monkeypatch.setenv("HOME", str(folder.parent))
    assert read_config(f"~/{folder.name}").to_dict() == read_config(str(folder)).to_dict()
    (folder.parent / "broken").mkdir()
    with pytest.raises(ModelError, match=r"^model '~/broken' could not be loaded"):
        read_config("~/broken")


def test_the_suffix_of_a_gguf_file_may_be_in_capitals() -> None:
    assert pretrained("folder/M.GGUF") == {"pretrained_model_name_or_path": "folder", "gguf_file": "M.GGUF"}


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


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "longrope", "original_max_position_embeddings": 16}, 16),
        ({"rope_type": "longrope"}, 64),
        # It changes beyond the model's positions alone, which no case reaches.
        ({"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16}, None),
        ({"full": {"rope_type": "longrope", "original_max_position_embeddings": 8}, "sliding": {}}, 8),
        ({"rope_type": "default"}, None),
        (None, None),
    ],
)
def test_the_length_from_which_a_rotary_embedding_depends_on_the_batch(rope: object, limit: int | None) -> None:
    assert rotary_limit(SimpleNamespace(rope_parameters=rope, max_position_embeddings=64)) == limit
