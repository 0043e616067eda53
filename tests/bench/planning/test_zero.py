from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from rlhfbench.errors import SweepError
from rlhfbench.planning.max_batch import BatchSearch
from rlhfbench.planning.predict import plan_case
from rlhfbench.planning.prediction import plan_object
from rlhfbench.planning.zero import Zero, cases_of_a_rank
from rlhfkernels import Case, CaseError, Options, build_step
from rlhfkernels.observer import PARTS
from rlhfkernels.training.sizes import StepSizes


@pytest.mark.parametrize(
    ("stage", "divided_parts"),
    [
        (0, set()),
        (1, {"optimizer"}),
        (2, {"optimizer"}),  # the changes of its step are those of a rank
        (3, set()),  # its step is that of a rank
    ],
)
def test_each_zero_stage_divides_what_deepspeed_divides(stage: int, divided_parts: set[str]) -> None:
    parts = Zero(stage=stage, world_size=4).divide(dict.fromkeys(PARTS, 101))
    assert {part for part, size in parts.items() if size == 26} == divided_parts
    assert {size for part, size in parts.items() if part not in divided_parts} == {101}


def test_a_zero_that_is_none_is_said() -> None:
    with pytest.raises(SweepError) as caught:
        Zero(stage=4, world_size=0)
    assert caught.value.problems == (
        "zero-stage is 4: it must be 0, 1, 2 or 3.",
        "world-size is 0: it must be a whole number of at least 1.",
    )


def test_stages_1_and_2_hold_a_whole_bucket_in_every_backward(make_case: Callable[..., Case]) -> None:
    step = build_step(make_case("hydra", dtype="bfloat16"))
    assert set(Zero(world_size=1).buckets(step).values()) == {0}
    # Stage 1 reduces in the optimizer's step, and keeps the bucket of every role until then.
    for stage, sizes in ((1, (1, 2, 2)), (2, (1, 1, 0))):
        buckets = Zero(stage=stage, world_size=8).buckets(step)
        found = [buckets[phase] // 1_000_000_000 for phase in ("update_actor", "update_critic", "optimize")]
        assert (tuple(found), buckets["generate"], buckets["score"]) == (sizes, 0, 0)


def test_the_optimizers_step_copies_gradients(make_case: Callable[..., Case]) -> None:
    step = build_step(make_case("sft", dtype="float32", parallel__reduce_bucket_size=10))
    numels = [p.numel() for p in step.trained_parameters()]
    whole, half = 4 * sum(numels), 2 * sum(numels)
    assert Zero(world_size=2).buckets(step)["optimize"] == whole
    # The tensor across the middle is copied by both ranks.
    before = next(i for i in range(len(numels)) if sum(numels[: i + 1]) * 2 > sum(numels))
    beyond = 4 * max(sum(numels[: before + 1]), sum(numels[before:])) - half
    assert Zero(stage=1, world_size=2).buckets(step)["optimize"] == half + beyond + 40
    assert Zero(stage=2, world_size=2).buckets(step)["optimize"] == half + beyond


def test_a_rank_holds_master_weights_of_float32_too(make_case: Callable[..., Case]) -> None:
    sizes = StepSizes.of(build_step(make_case("sft", dtype="float32")))
    parts = dict.fromkeys(PARTS, 0)
    for stage, masters in ((0, 0), (1, 1), (2, 1)):
        found = Zero(stage=stage, world_size=2).divide(parts, sizes)
        assert found == parts | {"optimizer": masters * sizes.trained.num_bytes // 2}


def test_buckets_count_in_what_fits(make_case: Callable[..., Case]) -> None:
    case = make_case("hydra", dtype="float32")
    bare, shared = plan_case(case), plan_case(case, Zero(stage=1, world_size=2))
    assert shared.memory["parts"]["buckets"] == pytest.approx(4_000_000_000, rel=1e-3)
    assert shared.total_bytes == shared.memory["total_bytes"] == sum(shared.memory["parts"].values())
    assert bare.memory["parts"]["buckets"] == 0
    assert plan_object(shared, None, None)["zero"] == {"stage": 1, "world_size": 2, "global_batch_size": 8}
    assert BatchSearch(3_900_000_000, Zero(stage=1, world_size=2)).largest(case) == 0
    assert BatchSearch(4_100_000_000, Zero(stage=1, world_size=2)).largest(case) > 0


def test_a_global_batch_is_divided_among_ranks() -> None:
    cases = [
        Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=size) for size in (4, 6, 8, 9)
    ]
    assert [case.batch_size for case in cases_of_a_rank([cases[0], cases[2]], 4)] == [1, 2]
    with pytest.raises(SweepError) as caught:
        cases_of_a_rank(cases, 4)
    assert caught.value.problems == (
        "batch_sizes has 6: with --global-batch it must be a multiple of world-size 4.",
        "batch_sizes has 9: with --global-batch it must be a multiple of world-size 4.",
    )
    with pytest.raises(CaseError, match="num_mini_batches is 4: it must divide batch_size 2"):
        cases_of_a_rank([dataclasses.replace(cases[2], options=Options.of({"ppo.num_mini_batches": 4}))], 4)
