"""The work that ranks do together beside the update: generate, stop, save, let go of a base."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhfkernels import Case, CaseError, Options, TrainingStep, build_step
from rlhfkernels.parallel.strategies import BaseModule, DataParallel, FullyShard, local
from rlhfkernels.parallel.world import ALONE, World

Make = Callable[..., Case]
FSDP = {"parallel__strategy": "fsdp", "parallel__world_size": 2}
BUCKET = {"parallel__reduce_bucket_size": 3000}


def statistics(world: World, cases: list[Case]) -> list[dict[str, float | None]]:
    return [build_step(case, world=world).run().to_dict() for case in cases]


@pytest.mark.parametrize("method", ["hydra", "full"])
def test_gathering_once_a_rollout_changes_nothing(make_case: Make, on_ranks: Any, method: str) -> None:
    cases = [make_case(method, **FSDP, parallel__gather=how) for how in ("layer", "rollout")]
    (by_layer, by_rollout), (layer_of_other, _) = on_ranks(2, statistics, cases)
    assert by_layer == by_rollout == layer_of_other  # of all ranks
    assert by_layer["actor_loss"] == pytest.approx(0, abs=1e-6)  # minus the mean of whitened advantages


def ends(world: World, case: Case) -> list[list[int]]:
    step = build_step(case, world=world)
    batch, _ = step.infer()
    return batch.mask.sum(1).int().tolist()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_that_stop_at_different_tokens_stay_together(make_case: Make, on_ranks: Any, strategy: str) -> None:
    options = {**FSDP, "parallel__strategy": strategy, "rollout__stop_token_id": 3, "rollout__temperature": 5.0}
    found = on_ranks(2, ends, make_case("lora", batch_size=1, completion_len=40, **options))
    assert found[0] != found[1]  # one rank's only sequence ended first


OPTIONS: tuple[dict[str, Any], ...] = (
    {"engine__micro_batch_size": 1, "ppo__num_mini_batches": 2, "ppo__num_ppo_epochs": 2},
    {"engine__gradient_checkpointing": True},
    {"lora__dtype": "float32"},
    {"engine__cache_implementation": "dynamic", "engine__attn_implementation": "eager"},
    {"ppo__critic_head": "frozen"},
)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_options_of_a_step_work_on_ranks(make_case: Make, on_ranks: Any, strategy: str) -> None:
    parallel = {**FSDP, "parallel__strategy": strategy}
    cases = [make_case("hydra", dtype="bfloat16", **parallel, **options) for options in OPTIONS]
    for options, first, second in zip(OPTIONS, *on_ranks(2, statistics, cases), strict=True):
        norms = {name: value for name, value in first.items() if name.endswith("norm")}
        assert norms == {name: second[name] for name in norms}, options
        assert all(norms.values()), options


def test_fsdp_takes_trained_weights_of_one_dtype_outside_the_layers() -> None:
    """OPT-350m has linear layers there, and torch only an assertion."""
    layer = GradientCheckpointingLayer()
    layer.adapter = torch.nn.Linear(2, 2)
    trunk, head = torch.nn.ModuleList([layer]), torch.nn.Linear(2, 1, dtype=torch.bfloat16)
    strategy = FullyShard(Options.of({"lora.dtype": "float32"}), ALONE, torch.device("cpu"))
    strategy._modules = {"policy": BaseModule(trunk, [head])}
    strategy.declare_trained({}, {})
    trunk.append(torch.nn.Linear(2, 2))
    with pytest.raises(CaseError, match=r"^lora\.dtype is 'float32': fsdp reduces .*, so it must be none\.$"):
        strategy.declare_trained({}, {})
    trunk[1].requires_grad_(False)
    strategy.declare_trained({}, {})


# Every strategy that divides weights, or moves them.
DIVIDED: dict[str, dict[str, Any]] = {
    "fsdp": FSDP,
    **{
        f"zero-{stage}": {**FSDP, "parallel__strategy": "deepspeed", "parallel__zero_stage": stage, "dtype": "float32"}
        for stage in (1, 3)
    },
}


def saved(world: World, cases: list[Case], folder: Path) -> None:
    for case in cases:
        step = build_step(case, world=world)
        step.save(folder / case.method)
        world.barrier()
        step.run()  # the weights are divided again


@pytest.mark.usefixtures("imported_deepspeed")
@pytest.mark.parametrize("strategy", DIVIDED)
def test_divided_weights_are_saved_whole(make_case: Make, on_ranks: Any, tmp_path: Path, strategy: str) -> None:
    cases = [make_case(method, **BUCKET, **DIVIDED[strategy]) for method in ("full", "hydra")]
    on_ranks(2, saved, cases, tmp_path / "ranks")
    for case in cases:
        build_step(make_case(case.method, dtype=case.dtype)).save(tmp_path / "alone" / case.method)
    names = sorted(path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*.safetensors"))
    assert [name.parts[0] for name in names] == ["full"] * 4 + ["hydra"] * 4
    for name in names:
        alone, ranks = (load_file(tmp_path / folder / name) for folder in ("alone", "ranks"))
        assert alone.keys() == ranks.keys()
        assert all(torch.equal(ranks[key], tensor) for key, tensor in alone.items()), name


def divided_after_a_failing_save(world: World, case: Case) -> list[bool]:
    step = build_step(case, world=world)
    strategy, weights = step.engine.strategy, functools.partial(step.engine.base_parameters, "policy")
    found = []
    with contextlib.suppress(OSError), strategy.whole():
        found.append(any(hasattr(weight, "to_local") for weight in weights()))
        raise OSError
    found.append(all(hasattr(weight, "to_local") for weight in weights()))
    return found


def test_a_failing_save_leaves_no_weight_gathered(make_case: Make, on_ranks: Any) -> None:
    assert on_ranks(2, divided_after_a_failing_save, make_case("full", **FSDP)) == [[False, True]] * 2


def bases_after(world: World, case: Case) -> list[str]:
    step = build_step(case, world=world)
    step.run()
    return sorted(step.engine.models)


def test_a_divided_reference_is_let_go(make_case: Make, on_ranks: Any, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "ab", "chosen": chr(97 + i), "rejected": "xyz"} for i in range(4)]
    file.write_text("\n".join(map(json.dumps, rows)))
    options = {"dpo__precompute_ref_log_probs": True, "data__pairs": str(file)}
    case = dataclasses.replace(make_case("dpo", batch_size=1, **FSDP, **options), model="tiny", dtype="float32")
    assert on_ranks(2, bases_after, case) == [["policy"], ["policy"]]


def buckets_sent(world: World, cases: list[Case]) -> list[int]:
    counts = []
    for case in cases:
        step = build_step(case, world=world)
        step.run()
        counts.append(_buckets_of_a_step(step))
    return counts


def _buckets_of_a_step(step: TrainingStep) -> int:
    strategy, sent = step.engine.strategy, []
    assert isinstance(strategy, DataParallel)
    average = strategy._average
    strategy._average = lambda key, bucket: sent.append(key) or average(key, bucket)  # type: ignore[method-assign]
    step.run()
    return len(sent)


def test_gradients_are_sent_once_a_mini_batch(make_case: Make, on_ranks: Any) -> None:
    options = {**FSDP, "parallel__strategy": "ddp"}
    cases = [make_case("lora", engine__micro_batch_size=size, **options) for size in (4, 1)]
    assert on_ranks(2, buckets_sent, cases) == [[2, 2], [2, 2]]  # the actor's and the critic's


def bytes_left(world: World, case: Case) -> dict[str, int]:
    """Bytes of the storages that live after a step beside those of the step itself, and of all weights."""
    step = build_step(case, world=world)
    step.run()
    # DeepSpeed keeps what it will read soon, up to the end of a step; a backward of fsdp lets go of what reads left.
    found = step.infer() if case.options.parallel.strategy == "fsdp" else step.run()
    del found
    gc.collect()
    kept = {local(tensor).untyped_storage()._cdata for _, tensor in step.persistent_tensors()}
    live = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and not hasattr(each, "to_local")]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in live}
    weights = [parameter for base in step.engine.models for parameter in step.engine.base_parameters(base)]
    whole = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in weights)
    return {
        "left": sum(num_bytes for key, num_bytes in storages.items() if key not in kept),
        "weights": whole * getattr(torch, case.dtype).itemsize,
    }


@pytest.mark.usefixtures("imported_deepspeed")
@pytest.mark.parametrize("gather", ["layer", "rollout"])
@pytest.mark.parametrize("strategy", ["fsdp", "zero-3"])
@pytest.mark.parametrize("method", ["full", "hydra"])
def test_no_gathered_weight_outlives_a_step(
    make_case: Make, on_ranks: Any, method: str, strategy: str, gather: str
) -> None:
    for rank in on_ranks(2, bytes_left, make_case(method, **BUCKET, **DIVIDED[strategy], parallel__gather=gather)):
        assert rank["left"] < 0.05 * rank["weights"]
