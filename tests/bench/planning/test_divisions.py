"""The plan of a rank under torch's strategies, beside the ledger of the rank that holds most."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

import rlhfbench
from rlhfbench.errors import SweepError
from rlhfbench.measure.memory import measure_memory
from rlhfbench.planning.predict import plan_case
from rlhfbench.planning.zero import Zero
from rlhfkernels import Case, CaseError, Options, build_step, phase_work
from rlhfkernels.parallel.world import World
from rlhfkernels.training.roofline import Work


def case_of(method: str, strategy: str, size: int = 2, *, options: dict[str, Any] | None = None, **fields: Any) -> Case:
    parallel = {"parallel.strategy": strategy, "parallel.world_size": size}
    sizes = {"prompt_len": 12, "completion_len": 3, "batch_size": 2, "dtype": "float32", **fields}
    return Case(method=method, model="tiny", **sizes, options=Options.of(parallel | (options or {})))


def totals(world: World, case: Case) -> dict[str, int]:
    """The highest total of each phase of a rank's steps from the third on: the second makes the buckets anew.

    The least of three: the threads of gloo may hold a tensor for a moment after it has served.
    """
    step = build_step(case, world=world)
    for _ in range(2):
        step.run()
    measured = [measure_memory(step, "cpu", lambda name: None).peaks for _ in range(3)]
    return {name: min(peaks[name].total_bytes for peaks in measured) for name in measured[0]}


@pytest.mark.parametrize(("method", "size"), [("hydra", 2), ("lora", 4), ("full", 2), ("full", 1)])
def test_a_plan_is_the_memory_of_the_worst_rank(on_ranks: Any, method: str, size: int) -> None:
    case = case_of(method, "fsdp", size)
    worst = max(on_ranks(size, totals, case), key=lambda rank: max(rank.values()))
    plan = plan_case(case)
    assert plan.total_bytes == pytest.approx(max(worst.values()), rel=1e-4)
    assert plan.zero.world_size == size
    assert not distributed.is_initialized()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("full", {}),
        ("dynamic-lora", {}),
        ("hydra", {"engine.micro_batch_size": 1}),
        ("dpo-lora", {"dpo.forward": "two-pass"}),
    ],
)
def test_a_plan_of_replicas_is_their_memory_in_every_phase(on_ranks: Any, method: str, options: dict[str, Any]) -> None:
    case = case_of(method, "ddp", options=options)
    phases = plan_case(case).memory["phases"]
    assert [{name: phase["total_bytes"] for name, phase in phases.items()}] * 2 == on_ranks(2, totals, case)


def works(world: World, case: Case) -> dict[str, Work]:
    return phase_work(build_step(case, world=world))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_plan_has_the_work_of_a_rank(on_ranks: Any, strategy: str) -> None:
    case = case_of("hydra", strategy)
    planned = plan_case(case).work
    assert planned == on_ranks(2, works, case)[0]
    alone = phase_work(build_step(dataclasses.replace(case, options=Options())))
    share = planned["optimize"].flops / alone["optimize"].flops
    assert share == pytest.approx({"ddp": 1, "fsdp": 1 / 2}[strategy], rel=1e-3)


def test_a_division_that_is_given_wins_over_the_options_of_a_case() -> None:
    alone = plan_case(case_of("hydra", "ddp"), Zero())
    assert alone.memory["phases"]["generate"]["parts"]["gradients"] == 0
    assert plan_case(case_of("hydra", "ddp")).memory["phases"]["generate"]["parts"]["gradients"] > 0
    given = Zero(stage=3, world_size=2)
    shared, replicated = (plan_case(case_of("hydra", strategy), given).memory for strategy in ("deepspeed", "ddp"))
    assert shared == replicated
    assert any(phase["parts"]["gathered"] for phase in shared["phases"].values())
    with pytest.raises(CaseError, match="adamw8bit"):
        plan_case(case_of("hydra", "ddp", options={"optimizer.name": "adamw8bit"}), given)


def test_a_process_that_is_a_rank_already_plans_no_divided_weights() -> None:
    distributed.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        with pytest.raises(CaseError, match=r"planned without a process group: plan before it is made\."):
            plan_case(case_of("hydra", "fsdp"))
    finally:
        distributed.destroy_process_group()


def test_batches_over_all_ranks_are_divided_by_the_ranks_of_each_case() -> None:
    cases = [case_of("hydra", "ddp", size, batch_size=4) for size in (1, 2)]
    plans = [planned.plan for planned in rlhfbench.plan([*cases, case_of("lora", "ddp", 1)], global_batch=True)]
    found = [(plan.case.method, plan.case.batch_size, plan.zero.world_size) for plan in plans]
    assert found == [("hydra", 4, 1), ("hydra", 2, 2), ("lora", 2, 1)]


def test_batches_that_the_ranks_of_several_cases_do_not_divide_are_all_named() -> None:
    cases = [case_of("hydra", "ddp", size, batch_size=batch_size) for size, batch_size in ((2, 3), (1, 3), (4, 6))]
    with pytest.raises(SweepError) as caught:
        rlhfbench.plan(cases, global_batch=True)
    assert caught.value.problems == tuple(
        f"batch_sizes has {batch_size}: with --global-batch it must be a multiple of world-size {size}."
        for size, batch_size in ((2, 3), (4, 6))
    )


def test_a_replica_of_one_is_one_process(make_case: Callable[..., Case]) -> None:
    alone, one = (
        plan_case(make_case("hydra", dtype="float32", engine__trunk="plain", **options))
        for options in ({}, {"parallel__strategy": "ddp"})
    )
    assert {**one.memory["parts"], "gradients": 0} == {**alone.memory["parts"], "gradients": 0}


def test_one_rank_of_deepspeed_has_its_copy_of_the_gradients() -> None:
    memory = plan_case(case_of("full", "deepspeed", 1)).memory
    assert any(phase["parts"]["buckets"] for phase in memory["phases"].values())
