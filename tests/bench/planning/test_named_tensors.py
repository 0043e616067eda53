"""The tensors that the timeline of a plan names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlhfbench.measure.memory import measure_memory
from rlhfbench.measure.timeline import Timeline
from rlhfbench.planning.predict import plan_case
from rlhfbench.planning.zero import Zero
from rlhfkernels import Case
from rlhfkernels.training.step import build_step

MakeCase = Callable[..., Case]


def names(timeline: dict[str, Any]) -> set[tuple[Any, ...]]:
    """Part, bytes, shape, dtype and op of each tensor."""
    columns = timeline["tensors"]
    rows = zip(*(columns[name] for name in ("part", "bytes", "shape", "dtype", "op")), strict=True)
    return {(part, num_bytes, tuple(shape), dtype, op) for part, num_bytes, shape, dtype, op in rows}


@pytest.mark.parametrize("method", ["sft-lora", "dpo-lora"])
def test_a_plan_names_the_tensors_that_the_step_has(make_case: MakeCase, method: str) -> None:
    case = make_case(method, "wide-llama", dtype="float32", prompt_len=12, completion_len=12, batch_size=2)
    timeline = Timeline()
    ledger = measure_memory(build_step(case), "cpu", lambda text: None, timeline)
    planned = plan_case(case, with_timeline=True).timeline
    assert planned is not None
    measured = timeline.to_dict(ledger.peaks)
    # One small tensor may be forgotten between the points of the one and not of the other.
    assert names(measured) <= names(planned)
    assert len(names(planned) - names(measured)) <= 1
    assert len(names(planned)) > 30


def test_the_tensors_of_a_rank_are_its_part(make_case: MakeCase) -> None:
    case = make_case("lora", "wide-llama", dtype="float32", prompt_len=4, completion_len=4)
    largest = []
    for world_size in (1, 4):
        timeline = plan_case(case, Zero(stage=1, world_size=world_size), with_timeline=True).timeline
        assert timeline is not None
        assert timeline["peak"]["total_bytes"] == max(map(sum, zip(*timeline["parts_bytes"].values(), strict=True)))
        tensors = zip(timeline["tensors"]["part"], timeline["tensors"]["bytes"], strict=True)
        largest.append(max(size for part, size in tensors if part == "optimizer"))
    assert largest[0] == 4 * largest[1]
