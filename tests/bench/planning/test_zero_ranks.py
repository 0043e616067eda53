"""The plan of a rank under DeepSpeed, beside the ledger of the rank that holds most."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhfbench.measure.memory import OUTER_VIEWS, measure_memory, memory_object
from rlhfbench.planning.predict import plan_case
from rlhfkernels import Case, Options, build_step, phase_work
from rlhfkernels.parallel.world import World
from rlhfkernels.training.roofline import Work


def case_of(method: str, stage: int, size: int) -> Case:
    options = {
        "parallel.strategy": "deepspeed",
        "parallel.world_size": size,
        "parallel.zero_stage": stage,
        "parallel.reduce_bucket_size": 100_000,
    }
    sizes = {"prompt_len": 12, "completion_len": 3, "batch_size": 2}
    return Case(method=method, model="tiny", dtype="float32", **sizes, options=Options.of(options))


def total_bytes(world: World, case: Case) -> int:
    """The highest total of a rank's step, the least of up to five; the moments are made in a first one.

    Gloo's threads may hold what they sent for a moment: on a busy machine a step held up to 7 % more. Where the least
    came twice on every rank, no further step is taken.
    """
    step = build_step(case, world=world)
    step.run()
    found: list[int] = []
    settled = torch.zeros(1)
    while not settled and len(found) < 5:
        ledger = measure_memory(step, "cpu", lambda name: None)
        found.append(memory_object(ledger, dict.fromkeys(OUTER_VIEWS))["total_bytes"])
        settled.fill_(found.count(min(found)) > 1)
        torch.distributed.all_reduce(settled, torch.distributed.ReduceOp.MIN)  # every rank takes as many steps
    return min(found)


def works(world: World, cases: list[Case]) -> list[dict[str, Work]]:
    return [phase_work(build_step(case, world=world)) for case in cases]


@pytest.mark.usefixtures("imported_deepspeed")
def test_a_plan_has_the_work_of_a_rank(on_ranks: Any) -> None:
    cases = [case_of("hydra", stage, 2) for stage in range(4)]
    for case, found in zip(cases, on_ranks(2, works, cases)[0], strict=True):
        planned = plan_case(case).work
        update, own = planned.pop("optimize"), found.pop("optimize")
        assert planned == found
        assert (update.flops, update.bytes) == pytest.approx((own.flops, own.bytes), rel=1e-3)  # counts and padding


@pytest.mark.usefixtures("imported_deepspeed")
@pytest.mark.parametrize(
    ("method", "stage", "size"),
    [
        ("full", 0, 1),
        ("full", 0, 2),
        ("full", 1, 2),
        ("full", 2, 2),
        ("joined-hydra", 1, 2),
        ("joined-hydra", 2, 2),
        ("lora", 2, 2),  # the last rank holds most
        ("full", 3, 2),
        ("hydra", 3, 4),
        ("dynamic-lora", 3, 2),
    ],
)
def test_a_plan_is_the_memory_of_the_worst_rank(on_ranks: Any, method: str, stage: int, size: int) -> None:
    case = case_of(method, stage, size)
    worst = max(on_ranks(size, total_bytes, case))
    assert plan_case(case).total_bytes == pytest.approx(worst, rel=1e-4)
