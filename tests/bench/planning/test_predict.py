from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhfbench.errors import SweepError
from rlhfbench.measure.ledger import Ledger
from rlhfbench.measure.memory import memory_object, run_under_ledger
from rlhfbench.planning.devices import find_accelerator
from rlhfbench.planning.predict import plan_case
from rlhfbench.planning.prediction import Plan
from rlhfbench.planning.zero import Zero
from rlhfkernels import METHODS, Case, Options, build_step
from rlhfkernels.config.settings import SETTINGS
from rlhfkernels.ops.native import build, matmul
from rlhfkernels.training.work import phase_work

ARCHITECTURES = ["llama", "opt", "gpt_neox", "gpt2", "qwen2"]
NAMES = ("model_bytes", "activation_bytes", "total_bytes")


@pytest.fixture
def library() -> None:
    reason = build.unavailable_reason()
    if reason is not None:
        pytest.skip(f"the C cannot be compiled here: {reason}")


def measured(case: Case) -> dict[str, object]:
    step = build_step(case)
    ledger = Ledger("cpu")
    run_under_ledger(step, ledger, ledger)
    return memory_object(ledger, {})


# Every method with half of the architectures, every architecture with half of the methods, and each of both with and
# without checkpointing, short and long.
@pytest.mark.parametrize(
    ("method", "architecture", "checkpointing", "length"),
    [
        (m, a, (i // 2 + j // 2) % 2 == 1, (12, 24)[(i // 4 + j // 2) % 2])
        for i, m in enumerate(METHODS)
        for j, a in enumerate(ARCHITECTURES)
        if (i + j) % 2 == 0
    ],
)
def test_the_plan_is_what_the_ledger_measures(
    make_case: Callable[..., Case], method: str, architecture: str, checkpointing: bool, length: int
) -> None:
    case = make_case(
        method,
        f"wide-{architecture}",
        dtype="float32",
        prompt_len=length,
        completion_len=length,
        batch_size=length // 6,
        engine__gradient_checkpointing=checkpointing,
    )
    plan, memory = plan_case(case).memory, measured(case)
    assert {name: plan[name] for name in NAMES} == {name: memory[name] for name in NAMES}


@pytest.mark.parametrize(
    ("method", "asked", "width"),
    [
        *itertools.product(["full", "hydra", "sft", "sft-lora", "dpo-lora"], [None], [4]),
        ("full", "float32", 4),
        *itertools.product(["full", "hydra", "sft", "sft-lora", "dpo-lora"], ["bfloat16"], [2]),
    ],
)
def test_gradients_that_add_up_in_another_dtype_are_planned_to_the_byte(
    make_case: Callable[..., Case], method: str, asked: str | None, width: int
) -> None:
    options = {"engine__micro_batch_size": 1, "optimizer__grad_accum_dtype": asked, "engine__logprob_chunk_size": 8}
    case = make_case(method, "wide-llama", dtype="bfloat16", prompt_len=16, completion_len=16, **options)
    plan, memory = plan_case(case).memory, measured(case)
    assert {name: plan[name] for name in NAMES} == {name: memory[name] for name in NAMES}
    assert plan["phases"] == memory["phases"]
    owned = [sum(p.numel() for p in each) for each in build_step(case).engine.parameters_of_role.values()]
    held = max(phase["parts"]["gradients"] for phase in memory["phases"].values())
    assert held in {width * sum(owned), *(width * each for each in owned)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["full", "hydra"])
def test_the_matmuls_of_a_mixture_of_experts_are_planned_to_the_byte(
    tmp_path: Path, make_case: Callable[..., Case], method: str, dtype: str
) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 48}
    more = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **shape, **more))
    model.save_pretrained(tmp_path)
    case = dataclasses.replace(make_case(method, dtype=dtype), model=str(tmp_path))
    plan, memory = plan_case(case).memory, measured(case)
    assert {name: plan[name] for name in NAMES} == {name: memory[name] for name in NAMES}


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("method", ["full", "hydra", "dpo-lora"])
def test_the_plan_is_what_the_ledger_measures_with_as_many_threads(
    make_case: Callable[..., Case], method: str, num_threads: int
) -> None:
    """Scratch buffers of the ops in C grow with them."""
    case = make_case(method, "wide-llama", dtype="float32", prompt_len=24, completion_len=24, batch_size=4)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert plan_case(case).memory["phases"] == measured(case)["phases"]
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("beats", [True, False])
def test_the_plan_counts_the_matmul_that_runs(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, beats: bool
) -> None:
    monkeypatch.setattr(matmul, "beats_torch", lambda: beats)
    case = make_case("sft", "wide-llama", dtype="float32", prompt_len=24, completion_len=24, engine__backend="native")
    assert plan_case(case).memory["phases"] == measured(case)["phases"]


@pytest.mark.parametrize("method", ["full", "lora", "dynamic-lora"])
def test_the_plan_of_a_reward_model_of_another_size_is_what_the_ledger_measures(
    make_case: Callable[..., Case], checkpoint: Callable[[str], str], method: str
) -> None:
    size = {"architecture": "wide-llama", "dtype": "float32", "prompt_len": 20}
    case = make_case(method, rollout__reward_model=checkpoint("small-reward"), **size)
    plan, memory = plan_case(case).memory, measured(case)
    for name in NAMES:
        assert plan[name] == memory[name], name
    assert plan["total_bytes"] < plan_case(make_case(method, **size)).memory["total_bytes"]


@pytest.mark.parametrize(
    ("architecture", "kernels", "batch_size"),
    [
        (architecture, kernels, (1, 4)[(i + j) % 2])
        for i, architecture in enumerate([*ARCHITECTURES, "mistral"])
        for j, kernels in enumerate(["auto", "torch"])
    ],
)
def test_what_generation_is_planned_to_take_is_what_the_ledger_measures(
    make_case: Callable[..., Case], architecture: str, batch_size: int, kernels: str
) -> None:
    """In the steps' own form: ``auto`` is the one in C where it can be compiled."""
    size = {"prompt_len": 4, "completion_len": 12, "batch_size": batch_size}
    case = make_case("hydra", architecture, dtype="float32", engine__backend=kernels, **size)
    assert plan_case(case).memory["phases"]["generate"] == measured(case)["phases"]["generate"]


# A dynamic cache runs on the plain trunk alone.
@pytest.mark.parametrize(
    ("engine", "dtype", "kv_cache"),
    [
        ("fast", "float64", "static"),
        ("fast", "float32", "static"),
        ("plain", "float64", "static"),
        ("plain", "float64", "dynamic"),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_a_long_completion_takes_what_stepping_through_takes_to_the_byte(
    make_case: Callable[..., Case],
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    kv_cache: str,
    engine: str,
    dtype: str,
) -> None:
    # A completion far longer than the prompt, and a tiny chunk, so that generation's own peak is in sight.
    size = {"prompt_len": 4, "completion_len": 40}
    case = make_case(
        "hydra", architecture, **size, engine__trunk=engine, engine__cache_implementation=kv_cache, dtype=dtype
    )
    skipping = plan_case(case).memory["phases"]["generate"]
    monkeypatch.setattr("rlhfkernels.engine.trunk.CacheSkips.can_skip", property(lambda self: False))
    assert plan_case(case).memory["phases"]["generate"] == skipping


def test_8_bit_states_are_planned_without_their_library(make_case: Callable[..., Case]) -> None:
    full = {"architecture": "wide-llama", "dtype": "float32"}
    wide, low = (plan_case(make_case("full", optimizer__name=name, **full)) for name in ("adamw", "adamw8bit"))
    states = [plan.memory["phases"]["optimize"]["parts"]["optimizer"] for plan in (wide, low)]
    # A byte for every four, and 4 for every block of 256; what is below 4096 elements stays wide.
    assert states[1] == pytest.approx(states[0] / 4 * (1 + 4 / 256), rel=0.03)


def test_the_backend_of_an_absent_device_changes_no_plan(make_case: Callable[..., Case]) -> None:
    plans = [plan_case(make_case(device="cuda", dtype="float32", engine__backend=name)) for name in ("torch", "triton")]
    assert plans[0].memory == plans[1].memory
    assert plans[1].case.options.engine.backend == "triton"


def test_skipping_skips(make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    from rlhfkernels.engine.trunk import CacheSkips

    skip = CacheSkips.skip_to
    monkeypatch.setattr(CacheSkips, "skip_to", lambda self, length: (lengths.append(length), skip(self, length))[1])
    plan_case(make_case("hydra", prompt_len=4, completion_len=40))
    assert lengths == [42]


# Hydra-RLHF, Table 1: Llama-7B, 400 + 400 tokens, LoRA rank 128, ZeRO-1 over 8 GPUs; GiB of model memory.
@pytest.mark.parametrize(("method", "gib"), [("joined-hydra", 14.3), ("hydra", 15.9), ("lora", 53.2)])
def test_the_papers_model_memory_comes_out_of_the_paper_setting(method: str, gib: float) -> None:
    fields = {key: value for key, value in SETTINGS["paper"].items() if key != "options"}
    # The model column does not depend on the length: a short one is planned sooner.
    case = Case(
        method=method,
        model="llama-7b",
        prompt_len=4,
        completion_len=4,
        batch_size=1,
        device="cuda",
        options=Options.of(SETTINGS["paper"]["options"]),
        **fields,
    )
    plan = plan_case(case, Zero(stage=1, world_size=8))
    assert plan.persistent_model_bytes / 2**30 == pytest.approx(gib, rel=0.01)


def test_storages_on_a_gpu_are_counted_in_its_allocators_blocks(make_case: Callable[..., Case]) -> None:
    case = make_case("hydra")
    on_gpu = plan_case(dataclasses.replace(case, device="cuda")).memory
    assert all(size % 512 == 0 for size in on_gpu["parts"].values())
    assert on_gpu["total_bytes"] > plan_case(case).memory["total_bytes"]


@functools.cache
def of_tiny(method: str, **options: object) -> Plan:
    size = {"model": "tiny", "prompt_len": 4, "completion_len": 44, "batch_size": 4}
    values = {name.replace("__", "."): value for name, value in options.items()}
    return plan_case(Case(method=method, **size, options=Options.of(values)))


@pytest.mark.parametrize("method", METHODS)
def test_the_fast_trunk_takes_no_more_memory(method: str) -> None:
    plain = of_tiny(method, engine__trunk="plain").total_bytes
    # Generation alone keeps its scratch buffers for all steps: 0.3 % of this case, where nothing larger follows.
    assert of_tiny(method).total_bytes <= plain * (1 if METHODS[method].trained_roles else 1.005)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.trained_roles])
def test_the_largest_tensor_is_one_chunk_of_logits(method: str) -> None:
    fast = of_tiny(method)
    # Logits never stand for more positions than a chunk has, whatever the batch and the length are.
    assert fast.memory["largest_tensor"]["bytes"] == 128 * 8192 * 4


def test_without_chunks_all_logits_stand_at_once() -> None:
    assert of_tiny("joined-hydra", engine__logprob_chunk_size=0).memory["largest_tensor"]["bytes"] == 4 * 44 * 8192 * 4


def test_accelerators_by_name_and_by_size() -> None:
    assert find_accelerator("A100-80GB").memory_bytes == 80 * 2**30
    assert find_accelerator("24GiB").memory_bytes == 24 * 2**30
    assert find_accelerator("80GB").memory_bytes == 80 * 10**9
    assert 0 < find_accelerator("24GiB").reserve_bytes < 2 * 2**30
    with pytest.raises(SweepError, match="gpu 'a1000-80gb' is unknown: did you mean 'a100-80gb'"):
        find_accelerator("a1000-80gb")


@pytest.mark.parametrize("size", ["0", "1KiB", "0.7GiB", "783MiB"])
def test_a_device_without_room_for_tensors_is_one_sentence(size: str) -> None:
    with pytest.raises(SweepError, match=rf"^gpu is '{size}': it must be above 0\.77 GiB, which CUDA itself takes\.$"):
        find_accelerator(size)
    assert find_accelerator("784MiB").usable_bytes > 0


def test_the_floor_needs_rates(make_case: Callable[..., Case]) -> None:
    plan = plan_case(make_case("hydra", dtype="bfloat16"))
    floor = plan.floor_s_per_sample(find_accelerator("a100-80gb"))
    assert floor is not None
    assert floor > 0
    assert plan.floor_s_per_sample(find_accelerator("24GiB")) is None


def test_the_rows_of_all_ranks_share_a_floor(make_case: Callable[..., Case]) -> None:
    case, gpu = make_case("sft-lora", dtype="bfloat16"), find_accelerator("a100-80gb")
    one, eight = (plan_case(case, Zero(stage=0, world_size=size)) for size in (1, 8))
    assert one.work == eight.work
    assert eight.floor_s_per_sample(gpu) == pytest.approx(one.floor_s_per_sample(gpu) / 8)


@pytest.mark.parametrize("trunk", ["fast", "plain"])
@pytest.mark.parametrize("method", ["sft-lora", "dpo-lora", "hydra"])
def test_the_plan_counts_the_masks_that_a_data_file_brings(tmp_path: Path, method: str, trunk: str) -> None:
    path = tmp_path / "data.jsonl"
    row = {"prompt": "short", "completion": "a", "chosen": "b", "rejected": "c"}
    path.write_text(json.dumps(row))
    values = {f"data.{METHODS[method].source}": str(path), "engine.trunk": trunk}
    size = {"model": "tiny", "prompt_len": 12, "completion_len": 12, "batch_size": 2}
    case = Case(method=method, **size, options=Options.of(values))
    plan, memory = plan_case(case).memory, measured(case)
    for name in NAMES:
        assert plan[name] == memory[name], name


OPTIONS = {
    "packed": ("sft-lora", {"sft__packing": True}),
    "packed, whole model": ("sft", {"sft__packing": True, "sft__completion_only_loss": False}),
    "packed, checkpointed": ("sft-lora", {"sft__packing": True, "engine__gradient_checkpointing": True}),
    "packed, two rows": ("sft-lora", {"sft__packing": True, "engine__micro_batch_size": 2}),
    "packed, one row": ("sft-lora", {"sft__packing": True, "engine__micro_batch_size": 1}),
    "two passes": ("dpo-lora", {"dpo__forward": "two-pass"}),
    "two passes, whole model": ("dpo", {"dpo__forward": "two-pass", "engine__micro_batch_size": 2}),
    "precomputed": ("dpo-lora", {"dpo__precompute_ref_log_probs": True}),
    "precomputed, whole model": ("dpo", {"dpo__precompute_ref_log_probs": True, "dpo__forward": "two-pass"}),
}


# On the plain trunk, the forms that it computes in its own way.
@pytest.mark.parametrize(
    ("name", "trunk"),
    [
        *((name, "fast") for name in OPTIONS),
        *((name, "plain") for name in ("packed", "packed, checkpointed", "two passes", "precomputed")),
    ],
)
def test_the_plan_of_every_form_of_a_step_is_what_the_ledger_measures(
    make_case: Callable[..., Case], name: str, trunk: str
) -> None:
    method, options = OPTIONS[name]
    size = {"dtype": "float32", "prompt_len": 20, "completion_len": 12, "engine__trunk": trunk}
    case = make_case(method, "wide-llama", **size, **options)
    plan, memory = plan_case(case).memory, measured(case)
    for part in NAMES:
        assert plan[part] == memory[part], part
    assert plan["phases"] == memory["phases"]


def test_no_packed_row_of_a_file_takes_more_than_its_plan(tmp_path: Path) -> None:
    path = tmp_path / "demonstrations.jsonl"
    size = {"model": "tiny", "prompt_len": 12, "completion_len": 12, "batch_size": 2}
    for text, full in (("short", False), ("x" * 12, True)):
        path.write_text(json.dumps({"prompt": text, "completion": text}))
        options = Options.of({"data.demonstrations": str(path), "sft.packing": True})
        case = Case(method="sft-lora", **size, options=options)
        plan, memory = plan_case(case).memory, measured(case)
        # A mask is planned for a file, and rows of full length have none.
        mask = 8 * 2 * 24
        if full:
            assert plan["total_bytes"] == memory["total_bytes"] + mask
        else:
            assert memory["total_bytes"] < plan["total_bytes"]


def test_two_passes_halve_the_activations_of_a_pair(make_case: Callable[..., Case]) -> None:
    size = {"architecture": "wide-llama", "dtype": "float32", "prompt_len": 30, "completion_len": 20}
    for method in ("dpo-lora", "dpo"):
        joint, two = (plan_case(make_case(method, dpo__forward=form, **size)) for form in ("joint", "two-pass"))
        one, other = (plan.memory["phases"]["update"]["parts"]["activations"] for plan in (joint, two))
        assert 0.4 * one < other < 0.55 * one, method
        assert two.total_bytes < joint.total_bytes


def test_a_prepared_step_needs_no_reference_model(make_case: Callable[..., Case]) -> None:
    size = {"architecture": "wide-llama", "dtype": "float32"}
    each = plan_case(make_case("dpo", **size)).memory["phases"]
    once = plan_case(make_case("dpo", dpo__precompute_ref_log_probs=True, **size)).memory["phases"]
    bases = {name: phase["parts"]["base"] for name, phase in once.items()}
    assert once["prepare"]["parts"]["base"] == each["score"]["parts"]["base"]
    assert bases["update"] == bases["optimize"] == bases["prepare"] / 2
    heads = {name: phase["parts"]["heads"] for name, phase in once.items()}
    assert heads["update"] == heads["prepare"] / 2
    table = 4 * 2 * 4
    for name in ("update", "optimize"):
        freed = bases["prepare"] / 2 + heads["prepare"] / 2
        assert once[name]["total_bytes"] == each[name]["total_bytes"] - freed + table, name


def test_the_floor_of_a_step_leaves_out_what_is_done_once(make_case: Callable[..., Case]) -> None:
    gpu = find_accelerator("a100-80gb")
    plans = [
        plan_case(make_case("dpo-lora", dtype="bfloat16", dpo__precompute_ref_log_probs=once)) for once in (True, False)
    ]
    score = plans[1].work["score"].floor_s(gpu.flops_per_s["bfloat16"], gpu.bytes_per_s) / 4
    floors = [plan.floor_s_per_sample(gpu) for plan in plans]
    assert floors[0] == pytest.approx(floors[1] - score)


def test_a_plan_takes_the_chunk_of_the_device_that_it_is_for() -> None:
    size = {"model": "tiny", "prompt_len": 4, "completion_len": 44, "batch_size": 4}
    for device, rows in (("cpu", 128), ("cuda", 4 * 44)):
        plan = plan_case(Case(method="joined-hydra", device=device, **size))
        assert plan.memory["largest_tensor"]["bytes"] == rows * 8192 * 4, device


# By name: method, model, dtype and options, each with an attention or a trunk that is not the default.
FORMS = {
    "gpt2, eager": ("full", "wide-gpt2", "float32", {"engine__attn_implementation": "eager"}),
    "opt, eager": ("lora", "wide-opt", "bfloat16", {"engine__attn_implementation": "eager"}),
    "gpt_neox, eager": ("hydra", "wide-gpt_neox", "float32", {"engine__attn_implementation": "eager"}),
    "qwen2, plain": ("dynamic-lora", "wide-qwen2", "bfloat16", {"engine__trunk": "plain"}),
}


# Generation alone has a cache, and it has no micro-batches: each cache and each size once.
@pytest.mark.parametrize(("cache", "micro_batch_size"), [("static", 1), ("dynamic", 2), ("static", None)])
@pytest.mark.parametrize("name", FORMS)
def test_every_attention_and_trunk_is_planned_to_the_byte_in_micro_batches(
    make_case: Callable[..., Case], name: str, cache: str, micro_batch_size: int | None
) -> None:
    method, model, dtype, options = FORMS[name]
    size = {"dtype": dtype, "prompt_len": 16, "completion_len": 16, "batch_size": 4}
    micro = {"engine__micro_batch_size": micro_batch_size, "engine__cache_implementation": cache}
    case = make_case(method, model, **size, **options, **micro)
    assert plan_case(case).memory["phases"] == measured(case)["phases"]


def test_a_model_whose_rotary_embedding_may_grow_is_planned(make_case: Callable[..., Case]) -> None:
    """transformers would compare lengths on the device; see ``load_causal_lm``."""
    case = make_case("hydra", "dynamic gpt_neox", dtype="float32")
    assert plan_case(case).memory["phases"] == measured(case)["phases"]


def test_the_floor_of_a_generation_that_may_end_at_once_is_one_token(make_case: Callable[..., Case]) -> None:
    """Its memory is that of all tokens."""
    ends, goes_on = (plan_case(make_case("hydra", rollout__stop_token_id=token)) for token in (1, None))
    assert ends.total_bytes == goes_on.total_bytes
    assert ends.work["generate"].flops < goes_on.work["generate"].flops
    work = phase_work(build_step(make_case("hydra", rollout__stop_token_id=1)))
    assert ends.work["generate"] == work["generate"]
