"""Plans for CUDA: the decode steps that run there, and the memory pool of their graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlhfbench.planning.decode_steps import pool_bytes
from rlhfbench.planning.predict import plan_case
from rlhfkernels import METHODS, Case, Options

MIB = 2**20


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], 0),
        ([512, 512, -512, 1024], 2 * MIB),
        ([MIB, MIB, 512], 4 * MIB),
        ([MIB, -MIB] * 9, 2 * MIB),
        ([MIB + 512, -MIB - 512], 20 * MIB),
        ([9 * MIB, 9 * MIB, 9 * MIB], 40 * MIB),
        ([11 * MIB, 12 * MIB + 512], 24 * MIB),
        ([512, 2 * MIB, 11 * MIB], 2 * MIB + 20 * MIB + 12 * MIB),
    ],
)
def test_a_pool_reserves_segments_by_the_sizes_of_blocks(changes: list[int], expected: int) -> None:
    assert pool_bytes(changes) == expected


def plans(make_case: Callable[..., Case], method: str, **options: object) -> tuple[dict, dict]:  # type: ignore[type-arg]
    """Memory with CUDA graphs and without."""
    fields = {"device": "cuda", "dtype": "bfloat16", "prompt_len": 12, "completion_len": 12, **options}
    both = (make_case(method, "wide-llama", engine__cuda_graphs=choice, **fields) for choice in ("auto", "off"))
    with_graphs, without = (plan_case(case).memory for case in both)
    return with_graphs, without


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.generate is not None])
def test_the_pool_stays_from_the_generation_to_the_end_of_the_step(make_case: Callable[..., Case], method: str) -> None:
    with_graphs, without = plans(make_case, method)
    # All scratch of a small step lies in one segment of 2 MiB.
    more = {
        name: phase["parts"]["temporary"] - without["phases"][name]["parts"]["temporary"]
        for name, phase in with_graphs["phases"].items()
    }
    assert 0 < more.pop("generate") <= 2 * MIB  # its peak without graphs may be that of reading the prompt
    assert set(more.values()) == {2 * MIB}


def test_a_plain_trunk_has_no_pool(make_case: Callable[..., Case]) -> None:
    with_graphs, without = plans(make_case, "hydra", engine__trunk="plain")
    assert with_graphs == without


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_two_shallow_models_show_the_decode_steps_of_a_deep_one(choice: str) -> None:
    fields = {"prompt_len": 40, "completion_len": 100, "batch_size": 4, "device": "cuda", "dtype": "bfloat16"}
    options = Options.of({"engine.cuda_graphs": choice})
    case = Case(method="hydra", model="smollm2-135m", **fields, options=options)  # type: ignore[arg-type]
    assert plan_case(case).memory == plan_case(case, every_layer=True).memory
