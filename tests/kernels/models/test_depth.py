from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from rlhfkernels import Case
from rlhfkernels.models.depth import Layers, alike_layers

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 48,
    "num_hidden_layers": 8,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"


def layers_of(folder: Path, model_type: str, **config: object) -> Layers | None:
    AutoConfig.for_model(model_type, **{**_SHAPE, **config}).save_pretrained(folder)
    return alike_layers(
        Case(method="hydra", model=str(folder), prompt_len=4, completion_len=4, batch_size=1), str(folder)
    )


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt_neox"])
def test_layers_that_are_all_alike(tmp_path: Path, model_type: str) -> None:
    assert layers_of(tmp_path, model_type) == Layers(count=8, period=1)


def test_a_folder_that_changes_is_looked_at_again(tmp_path: Path) -> None:
    assert layers_of(tmp_path, "llama") == Layers(count=8, period=1)
    assert layers_of(tmp_path, "llama", num_hidden_layers=6) == Layers(count=6, period=1)


def test_a_setting_whose_name_ends_in_idx_is_no_index(tmp_path: Path) -> None:
    """GPT-2's ``scale_attn_by_inverse_layer_idx`` is False, which equals the index of the first layer."""
    assert layers_of(tmp_path, "gpt2", n_layer=8, n_head=4, n_embd=32) == Layers(count=8, period=1)


@pytest.mark.parametrize(
    ("kinds", "period"),
    [
        ([_SLIDING, _FULL] * 4, 2),
        ([_SLIDING, _SLIDING, _FULL, _SLIDING] * 2, 4),
        ([_FULL] * 7 + [_SLIDING], None),
        ([_SLIDING] + [_FULL] * 7, None),
    ],
)
def test_kinds_that_take_turns_have_a_period(tmp_path: Path, kinds: list[str], period: int | None) -> None:
    found = layers_of(tmp_path, "gemma3_text", head_dim=8, sliding_window=8, layer_types=kinds)
    assert (None if found is None else found.period) == period


def test_layers_of_other_modules_differ(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    assert layers_of(tmp_path, "qwen3_moe", mlp_only_layers=[6], **experts) is None
    assert layers_of(tmp_path, "qwen3_moe", mlp_only_layers=[], **experts) == Layers(count=8, period=1)
