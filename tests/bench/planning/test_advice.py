from __future__ import annotations

import pytest

from rlhfbench.planning.advice import REMEDIES, advice
from rlhfbench.planning.devices import find_accelerator
from rlhfbench.planning.predict import Plan
from rlhfbench.planning.zero import Zero
from rlhfkernels import Case, Options
from rlhfkernels.observer import PARTS

GIB = 2**30


def sentence(
    part: str, *, zero: Zero | None = None, bucket_bytes: int = 0, method: str = "hydra", **changes: object
) -> str:
    """The advice for a case of which ``part`` takes 3 GiB and every other 1."""
    options = {name: changes.pop(name) for name in list(changes) if name in Options.__dataclass_fields__}
    fields = {"model": "tiny", "prompt_len": 4, "completion_len": 4, "batch_size": 1, **changes}
    case = Case(method=method, **fields, options=Options.of(options))
    parts = {**dict.fromkeys(PARTS, GIB), part: 3 * GIB}
    memory = {"parts": parts, "peak_phase": "score", "total_bytes": sum(parts.values())}
    plan = Plan(case=case, memory=memory, work={}, zero=zero or Zero(), buckets={"score": bucket_bytes})
    return advice(plan, find_accelerator("24GiB"))


def test_the_sentence_names_the_part_its_size_and_all_that_helps() -> None:
    assert sentence("base", method="full") == (
        "PPO at 8 tokens does not fit on 24GiB even at batch 1: its largest part is base with 3 GiB, and what would "
        "help is a method with fewer bases (dynamic-lora, joined-hydra, hydra), --dtype bfloat16, --zero-stage 3 over "
        "several ranks or a smaller model."
    )


def test_every_part_has_a_remedy_that_is_always_left() -> None:
    assert set(REMEDIES) == {*PARTS, "zero_buckets", "device_reserve"}
    done = {
        "method": "hydra",
        "dtype": "bfloat16",
        "lora_rank": 1,
        "lora_targets": "q_proj",
        "optimizer": "adamw8bit",
        "gradient_checkpointing": True,
        "logprob_chunk": 1,
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
        ("adapters", "--lora-rank", {"lora_rank": 1}),
        ("adapters", "lora_targets", {"lora_targets": "q_proj"}),
        ("adapters", "adapter_dtype", {"adapter_dtype": "bfloat16"}),
        ("gradients", "that trains adapters", {"method": "lora"}),
        ("gradients", "--zero-stage 2", {"zero": Zero(stage=2, world_size=2)}),
        ("optimizer", "that trains adapters", {"method": "joined-hydra"}),
        ("optimizer", "adamw8bit", {"optimizer": "adamw8bit"}),
        ("optimizer", "adamw8bit", {"optimizer": "sgd"}),
        ("optimizer", "--zero-stage 1", {"zero": Zero(stage=1, world_size=2)}),
        ("activations", "gradient_checkpointing", {"gradient_checkpointing": True}),
        ("temporary", "logprob_chunk", {"logprob_chunk": 16}),
    ],
)
def test_what_is_set_already_is_not_advised(part: str, text: str, setting: dict[str, object]) -> None:
    wide = {"method": "full", "lora_rank": 16} | ({"method": "lora"} if part == "adapters" else {})
    assert text in sentence(part, **wide)
    assert text not in sentence(part, **{**wide, **setting})


@pytest.mark.parametrize("part", ["activations", "temporary"])
def test_kept_attention_matrices_are_advised_away(part: str) -> None:
    assert "attention=sdpa" in sentence(part, attention="eager")
    assert "attention=sdpa" not in sentence(part)


def test_buckets_can_be_the_largest() -> None:
    told = sentence("base", zero=Zero(stage=1, world_size=2), bucket_bytes=4 * GIB)
    assert "its largest part is zero buckets with 4 GiB" in told


def test_no_rank_is_advised_where_no_adapter_is() -> None:
    assert "--lora-rank" not in sentence("gradients", method="full")
    assert "--lora-rank" in sentence("gradients", method="lora")
