from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhfkernels import Case, ModelError
from rlhfkernels.models.loading import load_model


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
