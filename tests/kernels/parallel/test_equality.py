"""Ranks of b rows each do the step of one process with all rows: gradients, clipping, weights, statistics."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhfkernels import Batch, Case, Observer, TrainingStep, build_step
from rlhfkernels.parallel.world import World
from rlhfkernels.training.stats import StepStats

ROWS = 4  # of a step, over all ranks


@dataclasses.dataclass(frozen=True)
class Kind:
    """A strategy, and how close it must come to one process."""

    options: dict[str, Any]
    dtype: str = "float64"
    rel: float = 1e-9
    abs: float = 1e-12


def zero(stage: int) -> Kind:
    """DeepSpeed, whose master weights are in float32; buckets smaller than a gradient, so that there are several."""
    options = {"parallel.strategy": "deepspeed", "parallel.zero_stage": stage, "parallel.reduce_bucket_size": 3000}
    return Kind(options, "float32", rel=1e-3, abs=1e-5)


STRATEGIES = {
    "ddp": Kind({"parallel.strategy": "ddp"}),
    "fsdp": Kind({"parallel.strategy": "fsdp"}),
    "zero-0": zero(0),
    "zero-1": zero(1),
    "zero-2": zero(2),
    "zero-3": zero(3),
}
PPO = ("full", "lora", "hydra", "joined-hydra")
# A step of SGD of length 1 moves every weight by its clipped gradient; AdamW's third step holds both moments.
OPTIMIZERS = {
    "gradients": ({"optimizer.name": "sgd", "optimizer.learning_rate": 1.0, "optimizer.max_grad_norm": 0.01}, 1),
    # With the default epsilon a gradient of 1e-8 moves a weight as far as one of 1, and so does its rounding.
    "weights": ({"optimizer.learning_rate": 1e-2, "optimizer.adam_epsilon": 1e-3}, 3),
}

Make = Callable[..., Case]
pytestmark = pytest.mark.usefixtures("imported_deepspeed")


def weights_of(step: TrainingStep) -> dict[str, torch.Tensor]:
    """Every trained weight, whole."""
    with step.engine.strategy.whole():
        return {
            f"{role}.{i}": getattr(weight, "full_tensor", weight.detach)().detach().clone()
            for role, weights in step.engine.parameters_of_role.items()
            for i, weight in enumerate(weights)
        }


def rollouts(step: TrainingStep, count: int) -> list[Batch]:
    """Rollouts of which some completions end early, in the case's dtype throughout."""
    dtype = getattr(torch, step.case.dtype)
    stage = step.method.generate
    assert stage is not None
    found = []
    for i in range(count):
        prompts = step._source.next_batch(step._generator)
        batch = step.engine.generate(stage.role, prompts, step._generator, Observer())
        batch.mask = batch.mask.to(dtype)
        batch.mask[i % ROWS, 3:] = 0
        batch.mask[-1, 1:] = 0
        batch["old_logprobs"] = batch["old_logprobs"].to(dtype)
        found.append(batch)
    return found


def trained_on(step: TrainingStep, batches: list[Batch]) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Statistics of each step on ``batches``, and the weights after the last."""
    step._updates.lengths_differ = True  # as with a stop token, which would leave the lengths to chance
    (score,) = (phase for phase in step.phases if phase.name == "score")
    found = []
    for batch in batches:
        stats = StepStats()
        step._score(score, batch, stats, Observer())
        found.append(step.update(batch, stats=stats).to_dict())
    return found, weights_of(step)


def rank_on_rollouts(world: World, case: Case, batches: list[Batch]) -> Any:
    step = build_step(case, world=world)
    size = case.batch_size
    return trained_on(step, [batch.select(slice(world.rank * size, (world.rank + 1) * size)) for batch in batches])


def rank_on_data(world: World, case: Case, num_steps: int) -> Any:
    step = build_step(case, world=world)
    return [step.run().to_dict() for _ in range(num_steps)], weights_of(step)


def fields(kind: Kind, size: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Fields and options of a case on ``size`` ranks, or of the same in one process."""
    parallel = {} if size == 1 else {**kind.options, "parallel.world_size": size}
    values = {"dtype": kind.dtype, **parallel, **changes}
    return {name.replace(".", "__"): value for name, value in values.items()}


def check(alone: Any, ranks: list[Any], kind: Kind) -> None:
    (own, expected), (first, _) = alone, ranks[0]
    for statistics, found in ranks:
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=kind.rel, atol=kind.abs)
        for mine, theirs in zip(own, statistics, strict=True):
            norms = {name: value for name, value in mine.items() if name.endswith("norm") or name in ("score", "kl")}
            assert {name: theirs[name] for name in norms} == pytest.approx(norms, rel=kind.rel, abs=kind.abs)
    for mine, theirs in zip(own, zip(*(statistics for statistics, _ in ranks), strict=True), strict=True):
        losses = {name: sum(each[name] for each in theirs) / len(ranks) for name in mine if name.endswith("loss")}
        assert losses == pytest.approx({name: mine[name] for name in losses}, rel=kind.rel, abs=kind.abs)
    assert set(first[0]) == set(own[0])


@pytest.mark.parametrize(
    ("method", "strategy", "optimizer"),
    [
        (method, strategy, optimizer)
        for method in PPO
        for strategy in STRATEGIES
        for optimizer in OPTIMIZERS
        # One of the two for DeepSpeed, whose ranks start in 1 s: with adapters alone AdamW's steps clip too little.
        if not strategy.startswith("zero")
        or optimizer == ("weights" if method == "full" else "gradients")
        or (method, optimizer) == ("hydra", "weights")
    ],
)
def test_two_ranks_do_the_step_of_one_process(
    make_case: Make, on_ranks: Any, method: str, strategy: str, optimizer: str
) -> None:
    kind, (changes, num_steps) = STRATEGIES[strategy], OPTIMIZERS[optimizer]
    step = build_step(make_case(method, batch_size=ROWS, **fields(kind, 1, changes)))
    batches = rollouts(step, num_steps)
    case = make_case(method, batch_size=ROWS // 2, **fields(kind, 2, changes))
    ranks = on_ranks(2, rank_on_rollouts, case, batches)
    before = {name: weight.clone() for name, weight in weights_of(step).items()}
    alone = trained_on(step, copy.deepcopy(batches))
    check(alone, ranks, kind)
    assert any(not torch.equal(weight, before[name]) for name, weight in alone[1].items())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("method", "size", "changes"),
    [
        ("sft", 2, {}),
        ("sft-lora", 4, {"sft.packing": True}),
        ("dpo", 2, {"dpo.forward": "two-pass", "engine.micro_batch_size": 1}),
        ("dpo-lora", 2, {"dpo.precompute_ref_log_probs": True}),
    ],
)
def test_ranks_take_the_rows_of_a_file_in_turns(
    make_case: Make, on_ranks: Any, tmp_path: Path, method: str, size: int, changes: dict[str, Any], strategy: str
) -> None:
    file = tmp_path / "rows.jsonl"
    source = "pairs" if method.startswith("dpo") else "demonstrations"
    texts = [("chosen", "rejected") if source == "pairs" else ("completion",)] * 12
    rows = [
        {"prompt": "x" * (1 + i % 4), **{name: chr(97 + i) * (1 + (i + k) % 5) for k, name in enumerate(names)}}
        for i, names in enumerate(texts)
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    changes |= {f"data.{source}": str(file), "optimizer.learning_rate": 1e-2, "optimizer.adam_epsilon": 1e-3}
    kind = STRATEGIES[strategy]
    # Text needs a vocabulary of 256.
    one, case = (
        dataclasses.replace(make_case(method, batch_size=rows, **fields(kind, ranks, changes)), model="tiny")
        for rows, ranks in ((ROWS, 1), (ROWS // size, size))
    )
    step = build_step(one)
    ranks = on_ranks(size, rank_on_data, case, 2)
    check(([step.run().to_dict() for _ in range(2)], weights_of(step)), ranks, kind)
