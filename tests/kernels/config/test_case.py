from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfkernels.config import case as case_module
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options, PPOOptions
from rlhfkernels.errors import CaseError
from rlhfkernels.methods.table import METHODS

GOOD = {"method": "hydra", "model": "tiny", "prompt_len": 4, "completion_len": 4, "batch_size": 4}


def test_a_case_survives_json() -> None:
    case = Case(**GOOD, options=Options.of({"ppo.kl_coef": 0.05, "lora.alpha": 1 / 128}))
    again = Case.from_dict(json.loads(json.dumps(case.to_dict())))
    assert again == case
    assert again.id == case.id


def test_a_case_of_an_old_record_takes_the_default_of_an_option_that_came_later() -> None:
    data = Case(**GOOD).to_dict()
    del data["options"]["engine"]["backend"]
    assert Case.from_dict(data).options.engine.backend == "auto"


def test_the_default_chunk_of_a_cpu_when_stated_changes_no_id_there() -> None:
    stated = Options.of({"engine.logprob_chunk_size": 128})
    assert Case(**GOOD, options=stated).id == Case(**GOOD).id
    assert Case(**GOOD, options=Options.of({"engine.logprob_chunk_size": 64})).id != Case(**GOOD).id
    on_cuda = {**GOOD, "device": "cuda"}
    assert Case(**on_cuda, options=stated).id != Case(**on_cuda).id


@pytest.mark.parametrize("field", ["prompt_len", "completion_len", "batch_size", "seed"])
def test_the_id_depends_on_every_number(field: str) -> None:
    case = Case(**GOOD)
    assert dataclasses.replace(case, **{field: 5}).id != case.id


def test_the_id_depends_on_the_options() -> None:
    assert Case(**GOOD, options=Options.of({"ppo.kl_coef": 0.5})).id != Case(**GOOD).id


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({}, {}, "b123935cab00"),
        (
            {"method": "lora", "batch_size": 8, "device": "cuda:1", "dtype": "bfloat16", "seed": 3},
            {},
            "de6cc8e99000",
        ),
        (
            {},
            {
                "ppo.kl_coef": 0.05,
                "lora.r": 8,
                "engine.cache_implementation": "dynamic",
                "ppo.reward_clip": None,
            },
            "56a21059e752",
        ),
    ],
    ids=["defaults", "fields", "options"],
)
def test_the_id_never_changes(changes: dict[str, object], options: dict[str, object], expected: str) -> None:
    """Runs are resumed and compared by these ids."""
    assert Case(**{**GOOD, **changes}, options=Options.of(options)).id == expected


def test_a_data_file_counts_in_the_id_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(path: object) -> str:
        return Case(**GOOD, options=Options.of({"data.prompts": str(path)})).id

    one, same = tmp_path / "one", tmp_path / "same"
    assert of(one) != of(same)  # absent files differ by their names
    one.write_bytes(b"1")
    same.write_bytes(b"1")
    before = of(one)
    assert before == of(same) != Case(**GOOD).id
    monkeypatch.chdir(tmp_path)
    assert of("one") == before
    one.write_bytes(b"2, and more")
    assert of(one) != before
    one.write_bytes(b"1")
    assert of(one) == before
    assert of(tmp_path) != of("\0")  # neither is a file


def test_a_new_option_changes_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
    class NewPPOOptions(PPOOptions):
        new: int = 3

    @dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
    class NewOptions(Options):
        ppo: PPOOptions = NewPPOOptions()

    before = Case(**GOOD).id
    monkeypatch.setattr(case_module, "Options", NewOptions)
    assert Case(**GOOD, options=NewOptions()).id == before
    assert Case(**GOOD, options=NewOptions(ppo=NewPPOOptions(new=4))).id != before


def test_an_integer_for_a_float_is_the_same_case() -> None:
    one, same = (Case(**GOOD, options=Options.of({"ppo.kl_coef": value})) for value in (1, 1.0))
    assert one == same
    assert one.id == same.id
    assert type(one.options.ppo.kl_coef) is float


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"method": "hydr"}, "method 'hydr' is unknown: did you mean 'hydra'"),
        ({"device": "gpu"}, "device 'gpu' is unknown"),
        ({"dtype": "float23"}, "dtype 'float23' is unknown: did you mean 'float32'"),
        ({"prompt_len": 0}, "prompt_len is 0: it must be an integer from 1 to 2147483647"),
        ({"completion_len": -3}, "completion_len is -3: it must be an integer from 1 to 2147483647"),
        ({"batch_size": True}, "batch_size is True: it must be an integer"),
        ({"batch_size": "4"}, "batch_size is '4': it must be an integer"),
        ({"options": Options.of({"lora.r": 0})}, "lora.r is 0: it must be an integer from 1 to 2147483647"),
        ({"seed": -1}, "seed is -1: it must be an integer of at least 0"),
        (
            {"options": Options.of({"rollout.temperature": 1e-39})},
            "rollout.temperature is 1e-39: it must be a finite number of at least 1e-06.",
        ),
        ({"options": Options.of({"ppo.gamma": 1.5})}, "ppo.gamma is 1.5: it must be a finite number from 0 to 1."),
        (
            {"options": Options.of({"ppo.kl_coef": float("nan")})},
            "ppo.kl_coef is nan: it must be a finite number of at least 0.",
        ),
        (
            {"options": Options.of({"lora.alpha": float("inf")})},
            "lora.alpha is inf: it must be a finite number above 0 or none.",
        ),
        (
            {"options": Options.of({"lora.alpha": 0.0})},
            "lora.alpha is 0.0: it must be a finite number above 0 or none.",
        ),
        (
            {"options": Options.of({"optimizer.warmup_steps": 100, "optimizer.max_steps": 100})},
            "optimizer.warmup_steps is 100: it must be below optimizer.max_steps, which is 100.",
        ),
        ({"options": Options.of({"ppo.reward_clip": -1.0})}, "ppo.reward_clip is -1.0"),
        (
            {"options": Options.of({"engine.attn_implementation": "sdp"})},
            "engine.attn_implementation 'sdp' is unknown: did you mean 'sdpa'",
        ),
        (
            {"options": Options.of({"ppo.num_mini_batches": 3})},
            "ppo.num_mini_batches is 3: it must divide batch_size 4",
        ),
        (
            {"options": Options.of({"engine.micro_batch_size": 3})},
            "engine.micro_batch_size is 3: it must divide the mini-batch of 4",
        ),
        (
            {"dtype": "float64", "options": Options.of({"optimizer.name": "adamw8bit"})},
            "optimizer.name is 'adamw8bit': bitsandbytes has no float64, so dtype must be float32 or bfloat16.",
        ),
        (
            {"method": "lora", "options": Options.of({"optimizer.name": "adamw8bit", "lora.dtype": "float64"})},
            "optimizer.name is 'adamw8bit': bitsandbytes has no float64, so lora.dtype must be float32 or bfloat16.",
        ),
        (
            {"options": Options.of({"engine.backend": "triton"})},
            "engine.backend is 'triton': it needs a CUDA device, so device must not be 'cpu'.",
        ),
        (
            {"device": "cuda", "dtype": "float64", "options": Options.of({"engine.backend": "triton"})},
            "engine.backend is 'triton': it has no float64, so dtype must be float32 or bfloat16.",
        ),
        (
            {"device": "cuda", "options": Options.of({"engine.backend": "native"})},
            "engine.backend is 'native': it runs on a CPU, so device must be 'cpu'.",
        ),
        (
            {"options": Options.of({"engine.cuda_graphs": "on"})},
            "engine.cuda_graphs is 'on': it needs a CUDA device, so device must not be 'cpu'.",
        ),
        (
            {"device": "cuda", "options": Options.of({"engine.cuda_graphs": "on", "engine.trunk": "plain"})},
            "engine.cuda_graphs is 'on': it captures steps of the fast trunk, so engine.trunk must not be 'plain'.",
        ),
        (
            {
                "device": "cuda",
                "options": Options.of({"engine.cuda_graphs": "on", "engine.attn_implementation": "eager"}),
            },
            "engine.cuda_graphs is 'on': it captures steps of the fast trunk, so engine.attn_implementation must not "
            "be 'eager'.",
        ),
        (
            {
                "device": "cuda",
                "options": Options.of({"engine.cuda_graphs": "on", "engine.cache_implementation": "dynamic"}),
            },
            "engine.cuda_graphs is 'on': it captures steps of the fast trunk, so engine.cache_implementation must not "
            "be 'dynamic'.",
        ),
        (
            {
                "device": "cuda",
                "options": Options.of(
                    {"engine.cuda_graphs": "on", "parallel.strategy": "fsdp", "parallel.world_size": 2}
                ),
            },
            "engine.cuda_graphs is 'on': divided weights are gathered in every step, so it must be auto or off.",
        ),
        (
            {"options": Options.of({"parallel.world_size": 2})},
            "parallel.world_size is 2: it needs parallel.strategy, one of ddp, fsdp, deepspeed.",
        ),
        (
            {"options": Options.of({"parallel.strategy": "fsdp", "parallel.zero_stage": 3})},
            "parallel.zero_stage is 3: ZeRO is DeepSpeed's, so parallel.strategy must be 'deepspeed'.",
        ),
        (
            {"options": Options.of({"parallel.strategy": "ddp", "parallel.gather": "rollout"})},
            "parallel.gather is 'rollout': no weights are divided, so parallel.strategy must be 'fsdp' or "
            "parallel.zero_stage 3.",
        ),
        (
            {"dtype": "float64", "options": Options.of({"parallel.strategy": "deepspeed"})},
            "parallel.strategy is 'deepspeed': its master weights are float32, so dtype must be float32 or bfloat16.",
        ),
        (
            {
                "dtype": "bfloat16",
                "options": Options.of({"parallel.strategy": "deepspeed", "lora.dtype": "float32"}),
            },
            "lora.dtype is 'float32': DeepSpeed lays trained weights in one storage, so it must be none or 'bfloat16'.",
        ),
        (
            {
                "dtype": "float32",
                "options": Options.of({"parallel.strategy": "deepspeed", "optimizer.name": "adamw8bit"}),
            },
            "optimizer.name is 'adamw8bit': DeepSpeed divides the states of torch's, so it must be adamw or sgd.",
        ),
        (
            {
                "dtype": "bfloat16",
                "options": Options.of({"parallel.strategy": "ddp", "optimizer.grad_accum_dtype": "float32"}),
            },
            "optimizer.grad_accum_dtype is 'float32': with parallel.strategy 'ddp' gradients add up in the "
            "dtype of the weights, so it must be none or 'bfloat16'.",
        ),
        (
            {
                "method": "sft-lora",
                "dtype": "bfloat16",
                "options": Options.of(
                    {
                        "parallel.strategy": "ddp",
                        "lora.dtype": "float32",
                        "optimizer.grad_accum_dtype": "bfloat16",
                    }
                ),
            },
            "add up in the dtype of the weights, so it must be none or 'float32'.",
        ),
        (
            {
                "dtype": "bfloat16",
                "options": Options.of(
                    {"parallel.strategy": "ddp", "lora.dtype": "float32", "optimizer.grad_accum_dtype": "float32"}
                ),
            },
            "add up in the dtype of the weights, so it must be none.",
        ),
        (
            {"dtype": "bfloat16", "options": Options.of({"engine.backend": "native"})},
            "engine.backend is 'native': it has no bfloat16, so dtype must be float32.",
        ),
        (
            {"options": Options.of({"engine.backend": "trition"})},
            "engine.backend 'trition' is unknown: did you mean 'triton'",
        ),
        (
            {"options": Options.of({"rollout.reward_model": "tiny"})},
            "rollout.reward_model is 'tiny': method 'hydra' has no base of its own for the reward, so it must be none.",
        ),
        (
            {"method": "lora", "options": Options.of({"rollout.reward_model": ""})},
            "rollout.reward_model is '': it must be a non-empty string or none.",
        ),
    ],
)
def test_each_broken_rule_is_one_sentence(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(CaseError) as caught:
        Case(**{**GOOD, **change})
    assert len(caught.value.problems) == 1
    assert sentence in caught.value.problems[0]


def test_deepspeed_takes_any_dtype_of_adapters_that_a_method_does_not_have() -> None:
    options = Options.of({"parallel.strategy": "deepspeed", "lora.dtype": "float32"})
    Case(**{**GOOD, "method": "sft", "dtype": "bfloat16"}, options=options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sft-lora", {"lora.dtype": "float32"}),
        ("hydra", {"lora.dtype": "float32", "ppo.critic_head": "frozen"}),
    ],
)
def test_gradients_of_ranks_may_be_asked_for_in_the_dtype_of_the_adapters(
    method: str, options: dict[str, object]
) -> None:
    """Adapters alone are trained here."""
    both = Options.of({"parallel.strategy": "ddp", "optimizer.grad_accum_dtype": "float32", **options})
    Case(**{**GOOD, "method": method, "dtype": "bfloat16"}, options=both)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(CaseError) as caught:
        Case(**{**GOOD, "method": "x", "prompt_len": 0, "dtype": "int3"})
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("method", METHODS)
def test_a_reward_model_is_accepted_by_methods_that_load_one(method: str) -> None:
    roles = METHODS[method].roles
    first = next(iter(roles.values()))
    loads_one = "reward" in roles and roles["reward"].base != first.base
    try:
        case = Case(**{**GOOD, "method": method}, options=Options.of({"rollout.reward_model": "gpt2"}))
    except CaseError:
        assert not loads_one
    else:
        assert loads_one
        assert case.models == ("tiny", "gpt2")
        assert (case.model_of("policy"), case.model_of("reward")) == ("tiny", "gpt2")
    assert Case(**{**GOOD, "method": method}).models == ("tiny",)


@given(batch=st.integers(1, 64), mini=st.integers(1, 8), micro=st.integers(1, 8))
def test_accepted_batches_divide_evenly(batch: int, mini: int, micro: int) -> None:
    try:
        case = Case(
            **{**GOOD, "batch_size": batch},
            options=Options.of({"ppo.num_mini_batches": mini, "engine.micro_batch_size": micro}),
        )
    except CaseError:
        assert batch % mini or (batch // mini) % micro
        return
    assert case.micro_batch_size * (case.mini_batch_size // case.micro_batch_size) * mini == batch
