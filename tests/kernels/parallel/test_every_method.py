"""Every method under every strategy does on two ranks what one process does; ``-s`` prints the relative errors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from rlhfkernels import Batch, Case, Observer, TrainingStep, build_step
from rlhfkernels.methods.program import Generate
from rlhfkernels.methods.table import METHODS
from rlhfkernels.parallel.world import World
from rlhfkernels.training.stats import StepStats

ROWS, NUM_STEPS = 4, 3
# One step of SGD moves every weight by its clipped gradient; AdamW's third step holds both moments.
OPTIMIZERS = {
    "gradient": ({"optimizer.name": "sgd", "optimizer.learning_rate": 10.0, "optimizer.max_grad_norm": 0.1}, 1),
    "weights": ({"optimizer.learning_rate": 1e-2, "optimizer.adam_epsilon": 1e-3}, NUM_STEPS),
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A strategy, and how far from one process it may be.

    Attributes:
        error: the norm of the difference, relative to what training moved.
        of_statistics: the relative difference and the absolute one that a statistic may have.
    """

    options: dict[str, Any]
    dtype: str = "float64"
    error: float = 1e-9
    of_statistics: tuple[float, float] = (1e-9, 1e-12)


def zero(
    stage: int, dtype: str = "float32", error: float = 1e-5, of_statistics: tuple[float, float] = (1e-3, 1e-5)
) -> Kind:
    """DeepSpeed, whose master weights are in float32; buckets smaller than a gradient, so that there are several."""
    options = {"parallel.strategy": "deepspeed", "parallel.zero_stage": stage, "parallel.reduce_bucket_size": 3000}
    return Kind(options, dtype, error, of_statistics)


KINDS = {
    "ddp": Kind({"parallel.strategy": "ddp"}),
    "fsdp": Kind({"parallel.strategy": "fsdp"}),
    **{f"ZeRO-{stage}": zero(stage) for stage in range(4)},
    **{f"ZeRO-{stage}, bfloat16": zero(stage, "bfloat16", 0.1, (0.1, 0.1)) for stage in range(4)},
}


# The others differ from these in no code that knows the dtype, or that adds up micro-batches.
SOME_METHODS = ("full", "hydra", "dpo-lora")
METHODS_OF = {"bfloat16": SOME_METHODS}
IN_MICRO_BATCHES = {**OPTIMIZERS["weights"][0], "engine.micro_batch_size": 1}
# Learning rates that fall and are not those of the other role, and weight decay; rounding in bfloat16 would hide them.
SCHEDULED = {"ppo.critic_learning_rate": 1.2e-2, "optimizer.max_steps": 12, "optimizer.weight_decay": 0.1}


@pytest.fixture(scope="module")
def table(imported_deepspeed: None) -> Iterator[dict[tuple[str, str], list[float]]]:
    """Relative errors by method and strategy, of gradient and weights; printed at the end."""
    found: dict[tuple[str, str], list[float]] = {}
    yield found
    kinds = dict.fromkeys(kind for _, kind in found)
    print("\n| method |", " | ".join(kinds), "|\n|" + " --- |" * (len(kinds) + 1))
    for method in METHODS:
        cells = [" / ".join(f"{error:.0e}" for error in found.get((method, kind), [])) for kind in kinds]
        print(f"| `{method}` |", " | ".join(cells), "|")


def batches_of(step: TrainingStep) -> list[Batch]:
    """Batches of which some completions end early, in the case's dtype where that is wider than float32."""
    dtype = torch.promote_types(getattr(torch, step.case.dtype), torch.float32)
    stage, found = step.method.generate, []
    for i in range(NUM_STEPS):
        rows = step._source.next_batch(step._generator)
        if stage is None:
            batch = rows
        else:
            samples = step.case.sequences_per_row
            batch = step.engine.generate(stage.role, rows, step._generator, Observer(), samples=samples)
        batch.columns = {name: column.to(dtype) for name, column in batch.columns.items()}
        batch.mask = batch.mask.to(dtype)
        batch.mask[i % ROWS, 3:] = 0
        batch.mask[-1, 1:] = 0
        found.append(batch)
    return found


def weights_of(step: TrainingStep) -> torch.Tensor:
    """Every trained weight, whole, in one vector."""
    with step.engine.strategy.whole():
        whole = [getattr(weight, "full_tensor", weight.detach)() for weight in step.trained_parameters()]
        return torch.cat([torch.empty(0), *(weight.detach().flatten().double() for weight in whole)])


class Trained(NamedTuple):
    """The distance that the weights moved, the rewards that the last batch got, and the statistics of each step."""

    moved: torch.Tensor
    rewards: torch.Tensor
    statistics: list[dict[str, float | None]]


def trained_on(step: TrainingStep, batches: list[Batch]) -> Trained:
    step._updates.lengths_differ = True  # as with a stop token, which would leave the lengths to chance
    before, statistics = weights_of(step), []
    for batch in batches:
        stats = StepStats()
        for phase in step.phases:
            if phase.kind == "inference" and not isinstance(phase.stages[0], Generate):
                step._score(phase, batch, stats, Observer())
        statistics.append(step.update(batch, stats=stats).to_dict())
    rewards = batch.columns.get("scores", torch.empty(0)).double()
    return Trained(weights_of(step) - before, rewards, statistics)


def ranks_part(world: World, work: list[tuple[Case, list[Batch]]]) -> list[Trained]:
    found = []
    for case, batches in work:
        mine = slice(world.rank * case.batch_size, (world.rank + 1) * case.batch_size)
        found.append(trained_on(build_step(case, world=world), [batch.select(mine) for batch in batches]))
    return found


def relative_error(alone: Trained, ranks: list[Trained]) -> float:
    """The norm of the difference, relative to that of one process; of rewards where nothing is trained."""
    pairs = [(rank.moved, alone.moved) for rank in ranks] if len(alone.moved) else []
    if len(alone.rewards):
        pairs.append((torch.cat([rank.rewards for rank in ranks]), alone.rewards))
    return max(float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs)


def other_statistics(alone: Trained, ranks: list[Trained], kind: Kind) -> list[tuple[str, Any, Any]]:
    """(name, wanted, found) of statistics that differ: after the first step objectives' are of a rank's rows."""
    wrong, (rel, absolute) = [], kind.of_statistics
    for i, (wanted, *found) in enumerate(zip(alone.statistics, *(rank.statistics for rank in ranks), strict=True)):
        assert all(each.keys() == wanted.keys() for each in found)
        for name, value in wanted.items():
            if name == "accuracy" and kind.dtype == "bfloat16":
                continue  # rounding may move a whole pair
            told = [each[name] for each in found]
            if i and not name.endswith("norm") and name not in ("score", "kl"):
                told = [max(told) if name.endswith("error") else sum(told) / len(told)]
            if told != pytest.approx([value] * len(told), rel=rel, abs=absolute):
                wrong.append((name, value, told))
    return wrong


def case_of(make_case: Callable[..., Case], method: str, rows: int, dtype: str, options: dict[str, Any]) -> Case:
    named = {key.replace(".", "__"): value for key, value in options.items()}
    return make_case(method, batch_size=rows, dtype=dtype, **named)


def alone_of(make_case: Callable[..., Case], dtype: str) -> Iterator[tuple[str, dict[str, Any], list[Batch], Trained]]:
    """(method, options, batches, what ``trained_on`` returns) of one process, for every method and optimizer."""
    ways = [(method, *way) for method in METHODS_OF.get(dtype, tuple(METHODS)) for way in OPTIMIZERS.values()]
    in_micro_batches = IN_MICRO_BATCHES if dtype == "bfloat16" else IN_MICRO_BATCHES | SCHEDULED
    ways += [(method, in_micro_batches, NUM_STEPS) for method in SOME_METHODS]
    for method, changes, num_steps in ways:
        step = build_step(case_of(make_case, method, ROWS, dtype, changes))
        batches = batches_of(step)[:num_steps]
        yield method, changes, copy.deepcopy(batches), trained_on(step, batches)


# By dtype: strategies of one dtype are compared with the same process.
_ALONE: dict[str, list[tuple[str, dict[str, Any], list[Batch], Trained]]] = {}


@pytest.mark.parametrize("name", KINDS)
def test_two_ranks_do_what_one_process_does(
    make_case: Callable[..., Case], on_ranks: Any, table: dict[tuple[str, str], list[float]], name: str
) -> None:
    kind = KINDS[name]
    parallel = {**kind.options, "parallel.world_size": 2}
    alone = _ALONE.get(kind.dtype) or list(alone_of(make_case, kind.dtype))
    _ALONE[kind.dtype] = alone
    work = [
        (case_of(make_case, method, ROWS // 2, kind.dtype, changes | parallel), batches)
        for method, changes, batches, _ in alone
    ]
    ranks = on_ranks(2, ranks_part, work)
    for i, (method, _, _, own) in enumerate(alone):
        table.setdefault((method, name), []).append(relative_error(own, [found[i] for found in ranks]))
        assert (method, other_statistics(own, [found[i] for found in ranks], kind)) == (method, [])
    assert all(len(own.moved) == 0 or own.moved.norm() > 0.1 for *_, own in alone)
    errors = {method: error for (method, kind_name), error in table.items() if kind_name == name}
    assert {method: error for method, error in errors.items() if max(error) > kind.error} == {}
