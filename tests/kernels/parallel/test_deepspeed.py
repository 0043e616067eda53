"""DeepSpeed as an optional package: what is said where it is missing or too old, and generation in stage 3."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhfbench.measure.collectives import CollectiveCounter
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


@pytest.mark.parametrize(("device", "before", "seen"), [("cuda:1", "2", "1"), ("cuda", "2", "2"), ("cpu", None, "0")])
def test_an_engine_chooses_the_device_of_the_case(
    monkeypatch: pytest.MonkeyPatch, bare_environment: None, device: str, before: str | None, seen: str
) -> None:
    if before is None:
        monkeypatch.delenv("LOCAL_RANK")
    else:
        monkeypatch.setenv("LOCAL_RANK", before)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(CaseError):
        load(torch.device(device))
    assert os.environ["LOCAL_RANK"] == seen


def completions(world: World, cases: list[Case]) -> list[torch.Tensor]:
    """The tokens that a rank generates."""
    return [build_step(case, world=world).infer()[0].tokens for case in cases]


STAGE_3 = {
    "parallel__strategy": "deepspeed",
    "parallel__world_size": 2,
    "parallel__zero_stage": 3,
    "parallel__reduce_bucket_size": 3000,
    "dtype": "float32",
    "completion_len": 3,
    "batch_size": 2,
}


def statistics(world: World, cases: list[Case]) -> list[tuple[str, dict[str, float | None]]]:
    """The trunk of each case, and the statistics of its second step."""
    found = []
    for case in cases:
        step = build_step(case, world=world)
        step.run()
        found.append((step.trunk_used, step.run().to_dict()))
    return found


@pytest.mark.usefixtures("imported_deepspeed")
@pytest.mark.parametrize("trunk", ["fast", "plain"])
def test_layers_that_stage_3_gathers_can_be_recomputed(
    make_case: Callable[..., Case], on_ranks: Any, trunk: str
) -> None:
    cases = [
        make_case("hydra", engine__gradient_checkpointing=again, engine__trunk=trunk, **STAGE_3)
        for again in (False, True)
    ]
    for kept, recomputed in on_ranks(2, statistics, cases):
        assert kept == recomputed
        assert kept[0] == trunk


@pytest.mark.usefixtures("imported_deepspeed")
def test_stage_3_generates_the_same_however_it_gathers(make_case: Callable[..., Case], on_ranks: Any) -> None:
    cases = [make_case("hydra", parallel__gather=gather, **STAGE_3) for gather in ("layer", "rollout")]
    first, second = on_ranks(2, completions, cases)
    assert torch.equal(*first)
    assert torch.equal(*second)
    assert not torch.equal(first[0], second[0])  # every rank samples its own


def gathers(world: World, cases: list[Case]) -> list[int]:
    """All-gathers of a generation."""
    counts = []
    for case in cases:
        step = build_step(case, world=world)
        step.run()
        with CollectiveCounter("cpu") as counter:
            step.infer(counter)
        counts.append(counter.calls["generate"]["all_gather"])
    return counts


@pytest.mark.usefixtures("imported_deepspeed")
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_a_rollout_gathers_every_layer_once(make_case: Callable[..., Case], on_ranks: Any, strategy: str) -> None:
    options = STAGE_3 | {"parallel__strategy": strategy, "parallel__zero_stage": 3 if strategy == "deepspeed" else 0}
    cases = [make_case("hydra", parallel__gather=how, **options) for how in ("layer", "rollout")]
    (by_layer, by_rollout), _ = counts = on_ranks(2, gathers, cases)
    # Two layers, for each of three tokens or once, and what is no layer, once. DeepSpeed prefetches, and has fewer.
    assert by_layer > by_rollout <= 3
    assert strategy == "deepspeed" or counts == [[7, 3], [7, 3]]
