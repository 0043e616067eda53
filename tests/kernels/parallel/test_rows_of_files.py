"""Ranks of b rows each take the rows of a data file in turns, and do the steps of one process with all rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from rlhfkernels import Case, Options, TrainingStep, build_step
from rlhfkernels.parallel.world import World
from rlhfkernels.training import step as training_step

ROWS = 4  # of a step, over all ranks
NUM_STEPS = 2
# What a data file changes in a step: rows of several lengths, padded or packed; two passes that add up, or one that is
# run once for the data set.
WAYS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "padded": ("sft", "demonstrations", {}),
    "packed": ("sft-lora", "demonstrations", {"sft.packing": True}),
    "two passes": ("dpo", "pairs", {"dpo.forward": "two-pass", "engine.micro_batch_size": 1}),
    "prepared": ("dpo-lora", "pairs", {"dpo.precompute_ref_log_probs": True}),
}
# With the default epsilon a gradient of 1e-8 moves a weight as far as one of 1, and so does its rounding.
ADAMW = {"optimizer.learning_rate": 1e-2, "optimizer.adam_epsilon": 1e-3}
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"parallel.strategy": "ddp"},
    "fsdp": {"parallel.strategy": "fsdp"},
    **{
        f"zero-{stage}": {
            "parallel.strategy": "deepspeed",
            "parallel.zero_stage": stage,
            "parallel.reduce_bucket_size": 3000,  # smaller than a gradient, so that there are several
        }
        for stage in range(4)
    },
}
# Relative and absolute, by dtype; DeepSpeed's master weights are in float32.
TOLERANCES = {"float64": (1e-9, 1e-12), "float32": (1e-3, 1e-5)}

# Statistics of each step, and every trained weight.
Trained = tuple[list[dict[str, float | None]], dict[str, torch.Tensor]]
pytestmark = pytest.mark.usefixtures("imported_deepspeed")


def weights_of(step: TrainingStep) -> dict[str, torch.Tensor]:
    """Every trained weight, whole."""
    with step.engine.strategy.whole():
        return {
            f"{role}.{i}": getattr(weight, "full_tensor", weight.detach)().detach().clone()
            for role, weights in step.engine.parameters_of_role.items()
            for i, weight in enumerate(weights)
        }


def trained(world: World, cases: list[Case]) -> Iterator[Trained]:
    for case in cases:
        step = build_step(case, world=world)
        yield [step.run().to_dict() for _ in range(NUM_STEPS)], weights_of(step)


def compared(world: World, cases: list[Case], alone: list[Trained]) -> list[list[dict[str, float | None]]]:
    """Compares this rank's weights with those of one process; returns its statistics, which are fewer to send."""
    found = []
    for way, (statistics, weights), (own, expected) in zip(WAYS, trained(world, cases), alone, strict=True):
        rel, absolute = TOLERANCES[cases[0].dtype]
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=rel, atol=absolute, msg=f"{way}: {name}")
        for mine, theirs in zip(own, statistics, strict=True):
            norms = {name: value for name, value in mine.items() if name.endswith("norm")}
            assert {name: theirs[name] for name in norms} == pytest.approx(norms, rel=rel, abs=absolute), way
        found.append(statistics)
    return found


@pytest.fixture(scope="module")
def cases(
    checkpoint: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., list[Case]]]:
    """Makes a case of each of ``WAYS`` on ``size`` ranks. Text is read as bytes, as for a preset."""
    folder = tmp_path_factory.mktemp("rows")
    for source, names in (("demonstrations", ["completion"]), ("pairs", ["chosen", "rejected"])):
        rows = [
            {"prompt": "x" * (1 + i % 4), **{name: chr(97 + i) * (1 + (i + k) % 5) for k, name in enumerate(names)}}
            for i in range(12)
        ]
        (folder / source).write_text("\n".join(map(json.dumps, rows)))

    def make(size: int, dtype: str, **parallel: Any) -> list[Case]:
        sizes = {"prompt_len": 5, "completion_len": 6, "batch_size": ROWS // size, "dtype": dtype}
        return [
            Case(
                method=method,
                model=checkpoint("bytes"),
                **sizes,
                options=Options.of(
                    {"lora.r": 3, f"data.{source}": str(folder / source), **ADAMW, **changes, **parallel}
                ),
            )
            for method, source, changes in WAYS.values()
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_step, "load_tokenizer", lambda model: None)
        yield make


@pytest.fixture(scope="module")
def alone(cases: Callable[..., list[Case]]) -> dict[str, list[Trained]]:
    """The results of one process, by dtype."""
    return {dtype: list(trained(World(), cases(1, dtype))) for dtype in TOLERANCES}


@pytest.mark.parametrize(("strategy", "size"), [*((strategy, 2) for strategy in STRATEGIES), ("ddp", 4)])
def test_ranks_take_the_rows_of_a_file_in_turns(
    cases: Callable[..., list[Case]], alone: dict[str, list[Trained]], on_ranks: Any, strategy: str, size: int
) -> None:
    parallel = {"parallel.world_size": size, **STRATEGIES[strategy]}
    dtype = "float32" if "parallel.zero_stage" in parallel else "float64"
    rel, absolute = TOLERANCES[dtype]
    ranks = on_ranks(size, compared, cases(size, dtype, **parallel), alone[dtype])
    for way, (own, _), *found in zip(WAYS, alone[dtype], *ranks, strict=True):
        for mine, *theirs in zip(own, *found, strict=True):
            losses = {name: value for name, value in mine.items() if name.endswith("loss")}
            means = {name: sum(each[name] for each in theirs) / size for name in losses}
            assert means == pytest.approx(losses, rel=rel, abs=absolute), way
