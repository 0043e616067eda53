from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rlhfkernels.training.optimizers import SGD, AdamW

SCHEDULE = {"lr": 0.1, "warmup_steps": 0, "total_steps": 1000, "max_grad_norm": 1e9}


def make_parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 4), (5,))]


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    for i, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(100 * step + i)
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.mark.parametrize("chunk_bytes", [1, 2**28])
def test_adamw_equals_torchs_own_over_several_steps(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    """Also where each weight is a chunk of its own."""
    monkeypatch.setattr("rlhfkernels.training.optimizers._WIDEN_BYTES", chunk_bytes)
    ours, theirs = make_parameters(torch.float32), make_parameters(torch.float32)
    optimizer = AdamW(ours, weight_decay=0.1, eps=1e-8, **SCHEDULE)
    expected = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.1, eps=1e-8, foreach=False)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        expected.param_groups[0]["lr"] = optimizer.lr
        optimizer.step()
        expected.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16_weights_follow_float32_masters() -> None:
    ours, wide = (
        make_parameters(torch.bfloat16),
        [nn.Parameter(p.detach().float()) for p in make_parameters(torch.bfloat16)],
    )
    schedule = {**SCHEDULE, "lr": 1e-4}
    low = AdamW(ours, weight_decay=0.0, eps=1e-8, **schedule)
    high = AdamW(wide, weight_decay=0.0, eps=1e-8, **schedule)
    for step in range(30):
        set_gradients(ours, step)
        for a, b in zip(ours, wide, strict=True):
            b.grad = None if a.grad is None else a.grad.float()
        low.step()
        high.step()
    # Single steps of 1e-4 vanish in bfloat16; their sum must not.
    for a, b in zip(ours, wide, strict=True):
        assert torch.equal(a, b.bfloat16())


def test_a_float32_weight_has_no_master_copy() -> None:
    """Adapters in float32 on a bfloat16 base, beside a head in bfloat16: the head alone has a copy."""
    wide, narrow = nn.Parameter(torch.ones(6, 2)), nn.Parameter(torch.ones(5).bfloat16())
    optimizer = SGD([wide, narrow], weight_decay=0.0, eps=1e-8, **{**SCHEDULE, "max_grad_norm": 100.0})
    (copy,) = optimizer.tensors()
    assert (copy.shape, copy.dtype) == (narrow.shape, torch.float32)
    for parameter in (wide, narrow):
        parameter.grad = torch.full_like(parameter, 0.5)
    lr = optimizer.lr
    optimizer.step()
    torch.testing.assert_close(wide.detach(), torch.full((6, 2), 1 - 0.5 * lr))
    assert torch.equal(narrow.detach(), copy.bfloat16())
    torch.testing.assert_close(copy, torch.full((5,), 1 - 0.5 * lr))


def test_the_norm_is_clipped_to_the_bound_and_reported_before() -> None:
    (parameter,) = make_parameters(torch.float32)[:1]
    before = parameter.detach().clone()
    optimizer = SGD([parameter], weight_decay=0.0, eps=0.0, **{**SCHEDULE, "lr": 1.0, "max_grad_norm": 0.5})
    parameter.grad = torch.full_like(parameter, 2.0)
    norm = optimizer.step()
    assert norm.item() == pytest.approx(2 * math.sqrt(12))
    assert (parameter.detach() - before).norm().item() == pytest.approx(0.5, rel=1e-4)
    assert parameter.grad is None


def test_a_weight_without_a_gradient_stays() -> None:
    moved, still = make_parameters(torch.float32)
    before = still.detach().clone()
    optimizer = AdamW([moved, still], weight_decay=0.1, eps=1e-8, **SCHEDULE)
    moved.grad = torch.ones_like(moved)
    optimizer.step()
    assert torch.equal(still, before)


def test_what_the_optimizer_holds_exists_from_the_start() -> None:
    low = AdamW(make_parameters(torch.bfloat16), weight_decay=0.0, eps=1e-8, **SCHEDULE)
    counts = 2 * 4
    assert sum(t.nbytes for t in low.tensors()) == 17 * 12 + counts
    high = AdamW(make_parameters(torch.float32), weight_decay=0.0, eps=1e-8, **SCHEDULE)
    assert sum(t.nbytes for t in high.tensors()) == 17 * 8 + counts
    assert SGD(make_parameters(torch.float32), weight_decay=0.0, eps=0.0, **SCHEDULE).tensors() == []


def test_a_rank_that_holds_no_weight_gives_a_norm_on_its_device() -> None:
    held: list[torch.Tensor] = []

    def all_ranks(squared: torch.Tensor) -> torch.Tensor:
        held.append(squared)
        return squared

    SGD(
        [nn.Parameter(torch.empty(0, 4, device="meta"))], weight_decay=0.0, eps=0.0, all_ranks=all_ranks, **SCHEDULE
    ).step()
    assert [squared.device.type for squared in held] == ["meta"]
