"""A step under ZeRO-3 on fake tensors: what a rank holds, at any depth, without DeepSpeed."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import pytest

from rlhfbench.planning.predict import plan_case
from rlhfbench.planning.zero import Zero
from rlhfkernels import Case, Options, build_step


def case_of(method: str, **options: object) -> Case:
    sizes = {"prompt_len": 6, "completion_len": 4, "batch_size": 2, "dtype": "float32"}
    return Case(method=method, model="tiny", **sizes, options=Options.of({"lora.r": 4, **options}))  # type: ignore[arg-type]


def test_a_rank_holds_its_parts_and_a_bucket_for_each_trained_base(make_case: Callable[..., Case]) -> None:
    case = make_case("dynamic-lora", dtype="float32", parallel__reduce_bucket_size=1000)
    step = build_step(case)
    weights = {p for model in step.engine.models.values() for p in model.trunk.parameters()}
    weights |= {
        p for model in step.engine.models.values() if model.lm_head is not None for p in model.lm_head.parameters()
    }
    weights |= {p for head in step.engine.scalar_heads.values() for p in head.parameters()}
    shares, trained = (sum(-(-p.numel() // 3) for p in found) for found in (weights, step.trained_parameters()))
    parts = plan_case(case, Zero(stage=3, world_size=3)).memory["phases"]["generate"]["parts"]
    assert (parts["gradients"], parts["optimizer"]) == (4 * trained, 4 * 3 * trained)
    assert parts["base"] == 4 * shares + sum(b.nbytes for m in step.engine.models.values() for b in m.trunk.buffers())
    assert parts["buckets"] == 2 * 4 * 1000


def test_deepspeed_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    case = case_of("lora", **{"parallel.strategy": "deepspeed", "parallel.zero_stage": 3, "parallel.world_size": 2})
    named, asked = plan_case(case), plan_case(case_of("lora"), Zero(stage=3, world_size=2))
    assert named.total_bytes == asked.total_bytes
    flops = {phase: work.flops for phase, work in plan_case(case_of("lora")).work.items()}
    halved = {**flops, "optimize": flops["optimize"] // 2}  # a rank steps its part
    assert {phase: work.flops for phase, work in named.work.items()} == halved


@pytest.mark.parametrize("bucket", [500_000_000, 100_000])
def test_few_layers_stand_for_all_where_one_bucket_holds_what_is_trained(bucket: int) -> None:
    case, zero = case_of("hydra", **{"parallel.reduce_bucket_size": bucket}), Zero(stage=3, world_size=4)
    assert plan_case(case, zero).memory == plan_case(case, zero, every_layer=True).memory


def test_a_rollout_gathers_layer_by_layer_or_once(make_case: Callable[..., Case]) -> None:
    stage = {"parallel__strategy": "deepspeed", "parallel__world_size": 2, "parallel__zero_stage": 3}
    by_layer, at_once = (
        plan_case(make_case("lora", dtype="float32", parallel__gather=gather, **stage)).memory["phases"]["generate"]
        for gather in ("layer", "rollout")
    )
    assert at_once["total_bytes"] > by_layer["total_bytes"]


def test_checkpoints_compute_again_with_gathered_weights() -> None:
    zero = Zero(stage=3, world_size=2)
    kept, again = (
        plan_case(
            dataclasses.replace(case_of("lora", **{"engine.gradient_checkpointing": on}), prompt_len=96), zero
        ).memory["phases"]["update_actor"]
        for on in (False, True)
    )
    assert again["parts"]["activations"] < kept["parts"]["activations"] / 2
    assert again["parts"]["gathered"] > 0
