from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch

from rlhfkernels import METHODS, Case, Observer, build_step
from rlhfkernels.engine.engine import Engine


def add_to(total: torch.Tensor, gradient: torch.Tensor) -> None:
    total.add_(gradient)


@pytest.mark.parametrize("method", METHODS)
def test_the_objective_and_its_gradient_do_not_depend_on_the_micro_batch(
    make_case: Callable[..., Case], method: str
) -> None:
    def gradients(micro: int) -> tuple[list[torch.Tensor], dict[str, float]]:
        # A stop token makes lengths differ, so that a mean of means would show.
        step = build_step(
            make_case(
                method, batch_size=4, engine__micro_batch_size=micro, rollout__stop_token_id=7, ppo__entropy_coef=0.01
            )
        )
        step.optimizers = {}
        stats = step.run()
        return [p.grad for p in step.trained_parameters()], {k: float(v) for k, v in stats.losses.items()}

    whole, whole_losses = gradients(4)
    for micro in (1, 2):
        parts, losses = gradients(micro)
        assert losses == pytest.approx(whole_losses, rel=1e-5, abs=1e-7)
        for a, b in zip(parts, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["full", "hydra", "sft", "dpo-lora"])
@pytest.mark.parametrize(
    ("micro", "asked", "taken"),
    [
        (None, None, torch.bfloat16),
        (None, "float32", torch.float32),
        (1, None, torch.float32),
        (1, "bfloat16", torch.bfloat16),
    ],
)
def test_gradients_of_micro_batches_add_up_in_float32(
    make_case: Callable[..., Case], method: str, micro: int | None, asked: str | None, taken: torch.dtype
) -> None:
    options = {"engine__micro_batch_size": micro, "optimizer__grad_accum_dtype": asked}
    step = build_step(make_case(method, dtype="bfloat16", batch_size=16, **options))
    step.optimizers = {}  # gradients stay
    parameters = step.trained_parameters()
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for parameter, total in zip(parameters, sums, strict=True):
        parameter.register_hook(functools.partial(add_to, total))
    step.run()
    assert {p.grad.dtype for p in parameters} == {taken}
    error = sum(float((p.grad - total).norm()) for p, total in zip(parameters, sums, strict=True))
    relative = error / sum(float(total.norm()) for total in sums)
    if micro is None or taken is torch.float32:
        assert relative < 1e-6
    else:  # what the default spares
        assert relative > 1e-3


def test_mini_batches_take_every_row_once_an_epoch(make_case: Callable[..., Case]) -> None:
    step = build_step(make_case(batch_size=6, ppo__num_mini_batches=3, ppo__num_ppo_epochs=2))
    batches = list(step._updates.mini_batches())
    assert [len(batch) for batch in batches] == [2, 2, 2]
    assert sorted(row for batch in batches for row in batch) == list(range(6))
    phases: list[str] = []
    observer = Observer()
    observer.enter_phase = phases.append
    step.run(observer)
    assert phases.count("optimize") == 6
    assert step.optimizers["actor"].num_steps == 6


def test_every_epoch_has_an_order_of_its_own(make_case: Callable[..., Case]) -> None:
    updates = build_step(make_case(batch_size=16, ppo__num_mini_batches=4))._updates
    first, second = ([row for rows in updates.mini_batches() for row in rows] for _ in range(2))
    assert first != list(range(16)) != second != first


@pytest.mark.parametrize(
    ("method", "options", "differ"),
    [
        ("hydra", {}, False),
        ("hydra", {"rollout__stop_token_id": 7}, True),
        ("sft", {"rollout__stop_token_id": 7}, False),
    ],
)
def test_lengths_differ_where_sampling_may_stop(
    make_case: Callable[..., Case], method: str, options: dict[str, int], differ: bool
) -> None:
    assert build_step(make_case(method, **options))._updates.lengths_differ is differ


@pytest.mark.parametrize("method", ["hydra", "lora"])
@pytest.mark.parametrize("num_mini_batches", [1, 2, 4])
def test_the_first_ratio_error_is_of_every_row(
    make_case: Callable[..., Case], method: str, num_mini_batches: int
) -> None:
    """A row whose old log-probabilities are off by 0.5 shows, whichever mini-batch the shuffle puts it in."""
    for row in range(4):
        step = build_step(make_case(method, ppo__num_mini_batches=num_mini_batches, optimizer__learning_rate=0.5))
        batch, stats = step.infer()
        batch["old_logprobs"][row] -= 0.5
        assert float(step.update(batch, stats=stats)["ratio_error"]) == pytest.approx(math.exp(0.5) - 1, rel=1e-5)


def test_later_steps_run_no_forward_pass_for_statistics(make_case: Callable[..., Case]) -> None:
    step = build_step(make_case(ppo__num_mini_batches=2))
    trained: list[bool] = []
    hidden = step.engine.hidden
    step.engine.hidden = lambda *rest, train=False, **more: trained.append(train) or hidden(*rest, train=train, **more)
    counts = []
    for _ in range(3):
        batch, _ = step.infer()
        trained.clear()
        step.update(batch)
        counts.append((trained.count(False), trained.count(True)))
    assert counts[1:] == [(0, 2 * len(step.method.trained_roles))] * 2
    assert counts[0][0] > 0


@pytest.mark.parametrize("micro", [None, 1])
@pytest.mark.parametrize("method", ["full", "hydra", "joined-hydra"])
def test_a_mini_batch_has_the_gradient_of_a_batch_of_its_rows(
    make_case: Callable[..., Case], shake: Callable[[Engine], None], method: str, micro: int | None
) -> None:
    """The means of a loss are over the tokens of the mini-batch, whatever the batch has."""
    options = {"engine__micro_batch_size": micro, "ppo__entropy_coef": 0.01}
    whole, twin = (build_step(make_case(method, batch_size=4, ppo__num_mini_batches=2, **options)) for _ in range(2))
    half = build_step(make_case(method, batch_size=2, **options))
    for step in (whole, half):
        shake(step.engine)
        step.optimizers = {}  # the gradients of both mini-batches add up
    batch, _ = whole.infer()
    batch.mask[0, 2:] = 0
    batch.mask[3, 4:] = 0
    whole.update(batch)
    for rows in twin._updates.mini_batches():
        half.update(batch.select(rows))
    for a, b in zip(whole.trained_parameters(), half.trained_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-8)
