from __future__ import annotations

import pytest

from rlhfbench.planning.advice import REMEDIES, advice
from rlhfbench.planning.devices import find_accelerator
from rlhfbench.planning.divisions import division_of
from rlhfbench.planning.prediction import Plan
from rlhfbench.planning.zero import Zero
from rlhfkernels import Case, Options
from rlhfkernels.observer import PARTS

GIB = 2**30


def sentence(part: str, *, zero: Zero | None = None, method: str = "hydra", **changes: object) -> str:
    """Returns the advice for a case whose ``part`` takes 3 GiB and every other part 1 GiB."""
    options = {name: changes.pop(name) for name in list(changes) if "." in name}
    fields = {"model": "tiny", "prompt_len": 4, "completion_len": 4, "batch_size": 1, **changes}
    case = Case(method=method, **fields, options=Options.of(options))
    parts = {**dict.fromkeys(PARTS, GIB), part: 3 * GIB}
    memory = {"parts": parts, "peak_phase": "score", "total_bytes": sum(parts.values())}
    plan = Plan(case=case, memory=memory, work={}, zero=zero or division_of(case))
    return advice(plan, find_accelerator("24GiB"))


def test_the_sentence_names_the_largest_part_its_size_and_the_remedies() -> None:
    assert sentence("base", method="full") == (
        "PPO at 8 tokens does not fit on 24GiB even at batch 1: its largest part is base with 3 GiB, and what would "
        "help is a method with fewer bases (dynamic-lora, joined-hydra, hydra), --dtype bfloat16, --zero-stage 3 over "
        "several ranks or a smaller model."
    )


def test_every_part_has_a_remedy_that_always_applies() -> None:
    assert set(REMEDIES) == {*PARTS, "device_reserve"}
    done = {
        "method": "hydra",
        "dtype": "bfloat16",
        "lora.r": 1,
        "lora.target_modules": "q_proj",
        "optimizer.name": "adamw8bit",
        "engine.gradient_checkpointing": True,
        "engine.logprob_chunk_size": 1,
        "zero": Zero(stage=3, world_size=8),
    }
    for part in PARTS:
        assert "what would help is a" in sentence(part, **done)


@pytest.mark.parametrize(
    ("part", "text", "setting"),
    [
        ("base", "fewer bases", {"method": "hydra"}),
        ("base", "--dtype", {"dtype": "bfloat16"}),
        ("base", "--zero-stage 3", {"zero": Zero(stage=3, world_size=2)}),
        ("adapters", "--lora-rank", {"lora.r": 1}),
        ("adapters", "lora.target_modules", {"lora.target_modules": "q_proj"}),
        ("adapters", "lora.dtype", {"lora.dtype": "bfloat16"}),
        ("gradients", "that trains adapters", {"method": "lora"}),
        ("gradients", "--zero-stage 2", {"zero": Zero(stage=2, world_size=2)}),
        ("optimizer", "that trains adapters", {"method": "joined-hydra"}),
        ("optimizer", "adamw8bit", {"optimizer.name": "adamw8bit"}),
        ("optimizer", "adamw8bit", {"optimizer.name": "sgd"}),
        ("optimizer", "adamw8bit", {"zero": Zero(stage=3, world_size=2)}),
        ("optimizer", "--zero-stage 1", {"zero": Zero(stage=1, world_size=2)}),
        ("activations", "gradient_checkpointing", {"engine.gradient_checkpointing": True}),
        ("temporary", "logprob_chunk", {"engine.logprob_chunk_size": 16}),
        ("buckets", "that trains adapters", {"method": "lora"}),
    ],
)
def test_options_that_are_set_already_are_not_advised(part: str, text: str, setting: dict[str, object]) -> None:
    wide = {"method": "full", "lora.r": 16} | ({"method": "lora"} if part == "adapters" else {})
    assert text in sentence(part, **wide)
    assert text not in sentence(part, **{**wide, **setting})


DEEPSPEED = {"parallel.strategy": "deepspeed", "parallel.world_size": 2}


@pytest.mark.parametrize(
    ("part", "text", "setting"),
    [
        ("optimizer", "adamw8bit", DEEPSPEED),
        ("adapters", "lora.dtype", {"dtype": "float32", **DEEPSPEED}),
        ("base", "--dtype", {"lora.dtype": "float32", **DEEPSPEED}),
        ("optimizer", "--zero-stage", {"optimizer.name": "adamw8bit"}),
        ("gradients", "--zero-stage", {"dtype": "float64"}),
    ],
)
def test_what_the_rules_of_the_case_refuse_is_not_advised(part: str, text: str, setting: dict[str, object]) -> None:
    assert text in sentence(part, method="lora", dtype="float32")
    assert text not in sentence(part, method="lora", **{"dtype": "float32", **setting})


@pytest.mark.parametrize("part", ["base", "adapters", "heads", "gradients", "optimizer"])
def test_shards_are_divided_among_more_ranks(part: str) -> None:
    told = sentence(part, method="lora", **{"parallel.strategy": "fsdp", "parallel.world_size": 2})
    assert "a larger --world-size" in told
    assert "--zero-stage" not in told


def test_replicas_are_divided_by_another_strategy() -> None:
    told = sentence("optimizer", method="full", **{"parallel.strategy": "ddp", "parallel.world_size": 2})
    assert "--parallel deepspeed --zero-stage 1 over several ranks" in told


def test_a_smaller_bucket_is_advised_first_in_the_stages_that_have_one() -> None:
    for stage in (1, 2, 3):
        told = sentence("buckets", method="full", zero=Zero(stage=stage, world_size=2))
        assert "what would help is a smaller parallel.reduce_bucket_size, --dtype bfloat16, a method that" in told
    told = sentence("buckets", method="full", zero=Zero(stage=0, world_size=2))
    assert "what would help is --dtype bfloat16, a method that trains adapters" in told
    assert "reduce_bucket_size" not in told


@pytest.mark.parametrize("part", ["activations", "temporary"])
def test_sdpa_is_advised_against_kept_attention_matrices(part: str) -> None:
    assert "engine.attn_implementation=auto" in sentence(part, **{"engine.attn_implementation": "eager"})
    assert "engine.attn_implementation=auto" not in sentence(part)


def test_a_smaller_rank_is_advised_only_with_adapters() -> None:
    assert "--lora-rank" not in sentence("gradients", method="full")
    assert "--lora-rank" in sentence("gradients", method="lora")


def test_two_passes_are_advised_for_pairs_in_one_graph() -> None:
    assert "--option dpo.forward=two-pass" in sentence("activations", method="dpo-lora")
    assert "dpo.forward" not in sentence("activations", method="dpo-lora", **{"dpo.forward": "two-pass"})
    assert "dpo.forward" not in sentence("activations", method="sft-lora")
