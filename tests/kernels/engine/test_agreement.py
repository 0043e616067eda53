from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from rlhfkernels import Case, ModelError, NumericalError, build_step
from rlhfkernels.engine import agreement
from rlhfkernels.engine.engine import Engine
from rlhfkernels.models import loading
from rlhfkernels.models.cache import PreallocatedLayer


@pytest.mark.parametrize("trunk", ["fast", "plain"])
def test_a_wrong_head_is_never_run(make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, trunk: str) -> None:
    monkeypatch.setattr(loading, "logit_scale", lambda config: 0.5)
    sentence = (
        rf"model '.*' is run wrongly: the full forward \({trunk} trunk\) and transformers' own forward disagree by "
        r"\d.*; the tolerance of float64 is \d.*e-05\."
    )
    with pytest.raises(ModelError, match=sentence):
        build_step(make_case(engine__trunk=trunk))


def test_wrong_decoding_is_never_run(make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    update = PreallocatedLayer.update

    def spoil(layer: PreallocatedLayer, key: torch.Tensor, value: torch.Tensor, *rest: object) -> object:
        return update(layer, key, value if key.shape[-2] > 1 else 1.1 * value, *rest)

    monkeypatch.setattr(PreallocatedLayer, "update", spoil)
    case = make_case(engine__trunk="plain")
    with pytest.raises(ModelError, match=r"decoding \(plain trunk\) and transformers' own forward disagree"):
        build_step(case)
    build_step(make_case(method="dpo-lora", engine__trunk="plain"))  # it decodes nothing


def test_a_base_without_a_language_model_head_is_checked_too(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the method ``lora``, the bases ``value`` and ``reward`` have scalar heads."""
    make_probe = loading._make_probe

    def spoil(name: str, model: object, case: Case, with_lm_head: bool) -> object:
        probe = make_probe(name, model, case, with_lm_head)
        return probe if with_lm_head else loading.Probe(tokens=probe.tokens, output=1.01 * probe.output)

    monkeypatch.setattr(loading, "_make_probe", spoil)
    with pytest.raises(ModelError, match="the full forward"):
        build_step(make_case(method="lora"))


def test_the_probe_is_dropped(make_case: Callable[..., Case]) -> None:
    engine = Engine(make_case(method="full"))
    assert all(model.probe is None for model in engine.models.values())


def test_weights_that_are_not_finite_are_a_numerical_error(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = loading.load_causal_lm

    def spoil(*arguments: object, **options: object) -> object:
        model = load(*arguments, **options)
        model.get_output_embeddings().weight.data[3, 0] = float("nan")
        return model

    monkeypatch.setattr(loading, "load_causal_lm", spoil)
    with pytest.raises(NumericalError, match=r"gives values that are not finite in float64\."):
        build_step(make_case())


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_model_that_reads_later_tokens_is_refused(make_case: Callable[..., Case], dtype: str) -> None:
    """It decodes nothing that would disagree."""
    case = make_case("sft", "two-way bert-generation", dtype=dtype)
    with pytest.raises(ModelError, match=r"reads later tokens \(BertGenerationEncoder\): it must be causal\.$"):
        Engine(case)


@pytest.mark.parametrize("architecture", ["bert-generation", "mistral", "mixtral", "phimoe"])
def test_a_causal_model_is_taken(make_case: Callable[..., Case], architecture: str) -> None:
    """One with experts too, which read another number of tokens where the last one differs."""
    assert Engine(make_case("sft", architecture, dtype="float32")).trunks


@pytest.mark.parametrize("architecture", ["phi3", "longrope gpt_neox"])
def test_generation_stays_below_a_change_of_the_rotary_embedding(
    make_case: Callable[..., Case], architecture: str
) -> None:
    fits = {"architecture": architecture, "prompt_len": 8, "completion_len": 8, "lora__target_modules": "all-linear"}
    assert Engine(make_case(**fits)).trunks["hydra"].name == "plain"
    Engine(make_case(**fits | {"completion_len": 9, "method": "sft-lora"}))
    for with_weights in (True, False):
        with pytest.raises(
            ModelError, match=r"completion_len is 17: the rotary embedding of model '.*' changes beyond 16"
        ):
            Engine(make_case(**fits | {"completion_len": 9}), with_weights=with_weights)


def test_the_tolerance_follows_the_range() -> None:
    reference = torch.tensor([[-3.0, -1.0], [-2.0, -7.0]])
    assert agreement.tolerance(reference, "float32") == pytest.approx(5 * agreement.TOLERANCES["float32"])
    flat = torch.full((2, 3), -9.0)
    assert agreement.tolerance(flat, "float32") == pytest.approx(0.09 * agreement.TOLERANCES["float32"])


def test_the_typical_error_is_that_of_most_positions() -> None:
    reference = torch.zeros(5, 3)
    found = reference.clone()
    found[:2] = 1.0
    assert agreement.typical_error(found, reference) == 0
    found[2, 1] = -2.0
    assert agreement.typical_error(found, reference) == 1
    found[0, 0] = float("nan")
    assert math.isnan(agreement.typical_error(found, reference))


def test_the_check_changes_no_random_state(make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    torch.manual_seed(0)
    checked = build_step(case).run().to_dict()
    state = torch.random.get_rng_state()
    monkeypatch.setattr(Engine, "_check_models", lambda engine: None)
    torch.manual_seed(0)
    assert build_step(case).run().to_dict() == checked
    assert torch.equal(torch.random.get_rng_state(), state)
