from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM

from rlhfkernels import Case, CaseError, build_step
from rlhfkernels.engine.engine import Engine
from rlhfkernels.methods.program import WeightSet

ARCHITECTURES = ["llama", "opt", "gpt_neox", "gpt2", "qwen2"]
BARE = WeightSet("hydra")
ACTOR = WeightSet("hydra", "actor")
CRITIC = WeightSet("hydra", "critic")


# Transformers' RMS norm rounds to float32 even in float64, the fast engine's does not.
NEAR = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("taken", ["plain", "fast"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_the_adapter_off_the_bases_outputs_come_back_bit_for_bit(
    make_case: Callable[..., Case], architecture: str, taken: str, shake: Callable[[Engine], None]
) -> None:
    case = make_case(architecture=architecture, engine__trunk=taken)
    tokens = torch.randint(48, (2, 11))
    plain = AutoModel.from_pretrained(case.model, dtype=torch.float64).eval()
    engine = Engine(case)
    with torch.no_grad():
        expected = engine.hidden(BARE, tokens, None)
        torch.testing.assert_close(expected, plain(input_ids=tokens).last_hidden_state, **NEAR)
        shake(engine)
        switched_on = engine.hidden(ACTOR, tokens, None)
        assert torch.equal(engine.hidden(BARE, tokens, None), expected)
        engine.hidden(CRITIC, tokens, None)
        assert torch.equal(engine.hidden(BARE, tokens, None), expected)
    assert not torch.allclose(switched_on, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_set_is_read_by_plain_peft(
    make_case: Callable[..., Case], architecture: str, tmp_path: Path, shake: Callable[[Engine], None]
) -> None:
    case = make_case(architecture=architecture, lora__alpha=0.5)
    step = build_step(case)
    shake(step.engine)
    step.save(tmp_path)
    tokens = torch.randint(48, (2, 11))
    for p in (ACTOR, CRITIC):
        model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float64).eval()
        loaded = PeftModel.from_pretrained(model, tmp_path / str(p.adapter), autocast_adapter_dtype=False)
        with torch.no_grad():
            hidden = step.engine.hidden(p, tokens, None)
            expected = step.engine.lm_head("actor")(hidden)
            torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, **NEAR)


def test_adapters_of_fused_experts_are_read_by_plain_peft(
    make_case: Callable[..., Case], tmp_path: Path, shake: Callable[[Engine], None]
) -> None:
    step = build_step(make_case(architecture="deepseek_v3", dtype="float32"))  # experts have no float64
    shake(step.engine)
    assert any("experts" in key for key in step.engine.adapters["hydra"].named_parameters("actor"))
    step.save(tmp_path)
    tokens = torch.randint(48, (2, 11))
    for p in (ACTOR, CRITIC):
        model = AutoModelForCausalLM.from_pretrained(step.case.model, dtype=torch.float32).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT advises against a target that it finds itself
            loaded = PeftModel.from_pretrained(model, tmp_path / str(p.adapter), autocast_adapter_dtype=False)
        with torch.no_grad():
            expected = step.engine.lm_head("actor")(step.engine.hidden(p, tokens, None))
            torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_part_of_a_fused_weight_is_no_target(make_case: Callable[..., Case]) -> None:
    case = make_case(architecture="deepseek_v3", dtype="float32", lora__target_modules="gate_proj")
    with pytest.raises(CaseError, match=r"lora\.target_modules is 'gate_proj': PEFT cannot attach an adapter there"):
        Engine(case)


def test_a_set_of_a_headless_base_is_read_by_plain_peft(
    make_case: Callable[..., Case], tmp_path: Path, shake: Callable[[Engine], None]
) -> None:
    step = build_step(make_case("lora"))
    shake(step.engine)
    step.save(tmp_path)
    tokens = torch.randint(48, (2, 11))
    trunk = AutoModel.from_pretrained(step.case.model, dtype=torch.float64).eval()
    loaded = PeftModel.from_pretrained(trunk, tmp_path / "critic", autocast_adapter_dtype=False)
    with torch.no_grad():
        expected = step.engine.hidden(WeightSet("value", "critic"), tokens, None)
        torch.testing.assert_close(loaded(input_ids=tokens).last_hidden_state, expected, **NEAR)


@pytest.mark.parametrize("order", list(itertools.permutations(["actor", "critic", None])))
def test_no_switch_changes_what_is_trained(make_case: Callable[..., Case], order: tuple[str | None, ...]) -> None:
    engine = Engine(make_case())
    adapters = engine.adapters["hydra"]
    adapters.train(["actor"])
    actor = {id(p) for p in adapters.parameters("actor")}
    for name in order + order:
        adapters.activate(name)
        assert {id(p) for p in adapters.parameters() if p.requires_grad} == actor
        assert not any(p.requires_grad for p in engine.base_parameters("hydra"))


def test_scaling_multiplies_the_low_rank_product(
    make_case: Callable[..., Case], shake: Callable[[Engine], None]
) -> None:
    tokens = torch.randint(48, (2, 11))
    hidden = []
    for scaling, factor in ((1 / 3, 3.0), (1.0, 1.0)):
        engine = Engine(make_case(lora__alpha=scaling))
        shake(engine)
        with torch.no_grad():
            for parameter in engine.adapters["hydra"].parameters("actor")[1::2]:
                parameter.mul_(factor)
            hidden.append(engine.hidden(ACTOR, tokens, None))
    torch.testing.assert_close(hidden[0], hidden[1])


def test_targets_may_be_named_and_are_checked(make_case: Callable[..., Case]) -> None:
    engine = Engine(make_case(lora__target_modules="q_proj, v_proj"))
    assert len(engine.adapters["hydra"].parameters("actor")) == 2 * 2 * 2
    sentence = r"lora\.target_modules has query: the linear layers of model '.*llama\d*' are down_proj"
    with pytest.raises(CaseError, match=sentence):
        Engine(make_case(lora__target_modules="query"))
    with pytest.raises(CaseError, match=r"lora\.target_modules has an empty name: the linear layers of model"):
        Engine(make_case(lora__target_modules="q_proj,"))


def test_a_method_without_adapters_takes_any_targets(make_case: Callable[..., Case]) -> None:
    engine = Engine(make_case("full", lora__target_modules="absent"))
    assert not any(adapters.parameters() for adapters in engine.adapters.values())


def test_the_adapters_dtype_is_decided(make_case: Callable[..., Case]) -> None:
    for stated, expected in ((None, torch.bfloat16), ("float32", torch.float32)):
        engine = Engine(make_case(dtype="bfloat16", lora__dtype=stated))
        assert {p.dtype for p in engine.adapters["hydra"].parameters()} == {expected}
