"""DeepSpeed as an optional package: what is said where it is missing or too old, and generation in stage 3."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhfkernels import Case, CaseError, build_step
from rlhfkernels.parallel.deepspeed import load
from rlhfkernels.parallel.world import World


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes what ``load`` sets."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch, bare_environment: None) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(CaseError) as caught:
        load(torch.device("cpu"))
    assert caught.value.problems == ("parallel.strategy is 'deepspeed': it needs deepspeed, which is not installed.",)


def test_an_old_package_is_said(monkeypatch: pytest.MonkeyPatch, bare_environment: None) -> None:
    package = types.ModuleType("deepspeed")
    package.__version__ = "0.9.5"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", package)
    with pytest.raises(CaseError) as caught:
        load(torch.device("cpu"))
    assert caught.value.problems == (
        "parallel.strategy is 'deepspeed': it needs deepspeed 0.19.0 or later, and 0.9.5 is installed.",
    )


def completions(world: World, case: Case) -> torch.Tensor:
    """The tokens that a rank generates."""
    batch, _ = build_step(case, world=world).infer()
    return batch.tokens


STAGE_3 = {
    "parallel__strategy": "deepspeed",
    "parallel__world_size": 2,
    "parallel__zero_stage": 3,
    "parallel__reduce_bucket_size": 3000,
    "dtype": "float32",
    "completion_len": 3,
    "batch_size": 2,
}


def statistics(world: World, case: Case) -> tuple[str, dict[str, float | None]]:
    step = build_step(case, world=world)
    step.run()
    return step.trunk_taken, step.run().to_dict()


@pytest.mark.usefixtures("imported_deepspeed")
@pytest.mark.parametrize("trunk", ["fast", "plain"])
def test_layers_that_stage_3_gathers_can_be_recomputed(
    make_case: Callable[..., Case], on_ranks: Any, trunk: str
) -> None:
    kept, recomputed = (
        on_ranks(
            2, statistics, make_case("hydra", engine__gradient_checkpointing=again, engine__trunk=trunk, **STAGE_3)
        )
        for again in (False, True)
    )
    assert kept == recomputed
    assert kept[0][0] == trunk


@pytest.mark.usefixtures("imported_deepspeed")
def test_stage_3_generates_the_same_however_it_gathers(make_case: Callable[..., Case], on_ranks: Any) -> None:
    by_layer, at_once = (
        on_ranks(2, completions, make_case("hydra", parallel__gather=gather, **STAGE_3))
        for gather in ("layer", "rollout")
    )
    assert all(torch.equal(one, other) for one, other in zip(by_layer, at_once, strict=True))
    assert not torch.equal(*by_layer)  # every rank samples its own
