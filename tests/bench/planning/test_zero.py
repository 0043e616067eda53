from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from rlhfbench.errors import SweepError
from rlhfbench.measure.tally import Tally, replay
from rlhfbench.planning.max_batch import BatchSearch
from rlhfbench.planning.predict import plan_case
from rlhfbench.planning.prediction import plan_object
from rlhfbench.planning.recording import record_step
from rlhfbench.planning.zero import Zero, cases_of_a_rank, trained_numels
from rlhfkernels import Case, CaseError, Options, build_step
from rlhfkernels.observer import Observer


def test_a_zero_that_is_none_is_said() -> None:
    with pytest.raises(SweepError) as caught:
        Zero(stage=4, world_size=0)
    assert caught.value.problems == (
        "zero-stage is 4: it must be 0, 1, 2 or 3.",
        "world-size is 0: it must be an integer of at least 1.",
    )
    with pytest.raises(SweepError, match=r"world-size is '2': it must be an integer of at least 1\."):
        Zero(stage=1, world_size="2")  # type: ignore[arg-type]


def test_stages_1_and_2_hold_a_whole_bucket_in_every_backward(make_case: Callable[..., Case]) -> None:
    case = make_case("hydra", dtype="bfloat16")
    # Stage 1 reduces in the optimizer's step, and keeps the bucket of every role until then.
    for stage, sizes in ((1, (1, 2, 2)), (2, (1, 1, 0))):
        phases = plan_case(case, Zero(stage=stage, world_size=8)).memory["phases"]
        buckets = {name: phase["parts"]["buckets"] for name, phase in phases.items()}
        found = [buckets[phase] // 1_000_000_000 for phase in ("update_actor", "update_critic", "optimize")]
        assert (tuple(found), buckets["generate"], buckets["score"]) == (sizes, 0, 0)


@pytest.mark.parametrize(("dtype", "held"), [("float32", (2, 3, 3)), ("bfloat16", (3, 3, 3))])
def test_stages_1_and_2_hold_masters_and_moments_of_a_part(
    make_case: Callable[..., Case], dtype: str, held: tuple[int, ...]
) -> None:
    case = make_case("sft", dtype=dtype)
    sizes = [p.numel() for p in build_step(case).trained_parameters()]
    for stage, num_ranks in ((0, 1), (1, 2), (2, 2)):  # float32 weights are their own masters in stage 0 alone
        found = plan_case(case, Zero(stage=stage, world_size=2)).memory["phases"]["update"]["parts"]["optimizer"]
        counts = len(sizes) if stage == 0 else 1
        assert found == 4 * held[stage] * sum(-(-size // num_ranks) for size in sizes) + 4 * counts


def test_the_rank_that_holds_most_may_be_the_one_that_reduces_first(make_case: Callable[..., Case]) -> None:
    """The first rank's part touches more, and the last rank's is made while more activations are there."""
    case = make_case("lora", dtype="float32", parallel__reduce_bucket_size=100)
    step = build_step(case)
    zero = Zero(stage=2, world_size=2)
    numels = trained_numels(step)
    assert zero.ranks(numels) == [0, 1]
    assert Zero(stage=2, world_size=5).ranks({"actor": (11, 28, 11)}) == [0, 3, 4]
    assert Zero(stage=3, world_size=5).ranks(numels) == Zero().ranks(numels) == [0]
    found = record_step(zero.of_a_rank(case), division=zero)
    totals = []
    for rank in (0, 1):
        tally = Tally()
        replay(zero.changes(rank, found.stretches, found.step, found.sizes, found.numels), tally, Observer())
        totals.append(tally.peak.total_bytes)
    assert plan_case(case, zero).total_bytes == max(totals) > min(totals)


def test_a_forward_has_no_bucket() -> None:
    """A bucket that the backward makes adds nothing where the forward of an update phase holds most."""
    phases = {}
    for size in (10_000, 100_000, 10_000_000):
        options = Options.of({"parallel.reduce_bucket_size": size})
        case = Case(
            method="joined-hydra", model="tiny", prompt_len=32, completion_len=32, batch_size=2, options=options
        )
        phases[size] = plan_case(case, Zero(stage=2, world_size=2)).memory["phases"]["update_actor_critic"]
    assert phases[10_000] == phases[100_000]
    assert phases[100_000]["parts"]["buckets"] == 0 < phases[10_000_000]["parts"]["buckets"]


def test_a_rank_runs_what_deepspeed_runs(make_case: Callable[..., Case]) -> None:
    with pytest.raises(CaseError, match=r"optimizer\.name is 'adamw8bit': DeepSpeed"):
        plan_case(make_case("hydra", dtype="float32", optimizer__name="adamw8bit"), Zero(stage=1, world_size=2))


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
