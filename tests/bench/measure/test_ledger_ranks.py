"""The ledger beside the collectives of a step that several ranks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed

from rlhfbench.measure.ledger import Ledger
from rlhfbench.measure.memory import measure_memory
from rlhfkernels import Case, build_step
from rlhfkernels.parallel.world import World


def collectives(world: World) -> list[dict[str, int]]:
    found = []
    sent, whole, bucket = torch.ones(8), [torch.empty(8), torch.empty(8)], torch.ones(4)
    with Ledger("cpu") as ledger:
        distributed.all_gather(whole, sent)
        found.append(ledger.parts)
        distributed.all_reduce(bucket)
        found.append(ledger.parts)
        ledger.tag("gradients", [bucket])
        found.append(ledger.parts)
    return found


def test_what_a_collective_reads_and_writes_has_a_part(on_ranks: Any) -> None:
    gathered, reduced, declared = on_ranks(2, collectives)[1]
    assert {part: size for part, size in gathered.items() if size} == {"gathered": 24 * 4}
    assert {part: size for part, size in reduced.items() if size} == {"gathered": 24 * 4, "buckets": 4 * 4}
    assert {part: size for part, size in declared.items() if size} == {"gathered": 24 * 4, "gradients": 4 * 4}


def test_a_storage_that_was_empty_is_gathered_into() -> None:
    weight = torch.ones(6)
    weight.untyped_storage().resize_(0)
    with Ledger("cpu") as ledger:
        weight.untyped_storage().resize_(6 * 4)
        assert ledger.parts["gathered"] == ledger.total_bytes == 6 * 4
        weight.untyped_storage().resize_(0)
        assert ledger.total_bytes == 0


def memory(world: World, case: Case) -> dict[str, Any]:
    step = build_step(case, world=world)
    step.run()
    return {name: peak.parts for name, peak in measure_memory(step, "cpu", lambda name: None).peaks.items()}


def test_a_rank_holds_half_of_what_is_divided(make_case: Callable[..., Case], on_ranks: Any) -> None:
    divided = {"parallel__strategy": "fsdp", "parallel__world_size": 2}
    (alone,) = on_ranks(1, memory, make_case("lora", batch_size=2, engine__trunk="plain"))
    for rank in on_ranks(2, memory, make_case("lora", batch_size=2, **divided)):
        for phase, parts in alone.items():
            for part in ("base", "adapters", "heads", "optimizer"):
                # A tensor whose first dimension is odd is divided unevenly, and a step count is not divided.
                assert abs(rank[phase][part] - parts[part] / 2) <= 0.1 * parts[part], (phase, part)
            assert (rank[phase]["gathered"] > 0) == (phase != "optimize")
        assert 0 < rank["optimize"]["gradients"] <= 0.6 * alone["optimize"]["gradients"]


def test_the_buckets_of_data_parallel_ranks_are_their_gradients(make_case: Callable[..., Case], on_ranks: Any) -> None:
    shared = {"parallel__strategy": "ddp", "parallel__world_size": 2}
    (alone,) = on_ranks(1, memory, make_case("lora", batch_size=2))
    for rank in on_ranks(2, memory, make_case("lora", batch_size=2, **shared)):
        for phase, parts in alone.items():
            held = {part: parts[part] for part in ("base", "adapters", "heads", "optimizer")}
            assert {part: rank[phase][part] for part in held} == held, phase
            assert rank[phase]["gradients"] == alone["optimize"]["gradients"], phase


@pytest.mark.parametrize(("stage", "num_buckets"), [(1, 2), (2, 1)])
def test_the_buckets_of_deepspeed_have_a_part(
    make_case: Callable[..., Case], on_ranks: Any, stage: int, num_buckets: int
) -> None:
    """Stage 1 keeps a role's bucket until the optimizer's step, stage 2 until the end of the backward."""
    pytest.importorskip("deepspeed")
    size = 1_000_000  # above all else that the step makes, so that the peak has the buckets
    shared = {"strategy": "deepspeed", "world_size": 2, "zero_stage": stage, "reduce_bucket_size": size}
    case = make_case("hydra", batch_size=2, dtype="float32", **{f"parallel__{k}": v for k, v in shared.items()})
    for rank in on_ranks(2, memory, case):
        assert rank["update_actor"]["buckets"] == 4 * size
        assert rank["update_critic"]["buckets"] == num_buckets * 4 * size
