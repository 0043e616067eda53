from __future__ import annotations

import importlib.util
import math
import sys
import types

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhfkernels.errors import CaseError
from rlhfkernels.training.optimizers import SGD, AdamW, AdamW8bit, AdamW8bitStates, cosine_factor

SCHEDULE = {"lr": 0.1, "warmup_steps": 0, "total_steps": 1000, "max_grad_norm": 1e9}


def make_parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 4), (5,))]


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    for i, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(100 * step + i)
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_adamw_equals_torchs_own_over_several_steps() -> None:
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


def test_the_schedule_warms_up_and_ends_at_0() -> None:
    assert [cosine_factor(step, 4, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert cosine_factor(4, 4, 100) == 1.0
    assert cosine_factor(52, 4, 100) == pytest.approx(0.5)
    assert cosine_factor(100, 4, 100) == pytest.approx(0.0, abs=1e-12)
    assert cosine_factor(500, 4, 100) == pytest.approx(0.0, abs=1e-12)


def test_what_the_optimizer_holds_exists_from_the_start() -> None:
    low = AdamW(make_parameters(torch.bfloat16), weight_decay=0.0, eps=1e-8, **SCHEDULE)
    counts = 2 * 4
    assert sum(t.nbytes for t in low.tensors()) == 17 * 12 + counts
    high = AdamW(make_parameters(torch.float32), weight_decay=0.0, eps=1e-8, **SCHEDULE)
    assert sum(t.nbytes for t in high.tensors()) == 17 * 8 + counts
    assert SGD(make_parameters(torch.float32), weight_decay=0.0, eps=0.0, **SCHEDULE).tensors() == []


def eight_bit_bytes(*numels: int) -> int:
    """The rules of bitsandbytes' states by hand: two moments, a scale a block of 256, two maps of 256 numbers."""
    large = [n for n in numels if n >= 4096]
    scales = sum(math.ceil(n / 256) for n in large)
    return sum(2 * n for n in large) + 2 * 4 * scales + sum(8 * n for n in numels if n < 4096) + 2 * 256 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_states_take_the_bytes_of_the_librarys_rules(dtype: torch.dtype) -> None:
    shapes = ((64, 64), (4095,), (4097,), (300, 100))
    with FakeTensorMode():
        parameters = [nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in shapes]
        optimizer = AdamW8bitStates(parameters, weight_decay=0.0, eps=1e-8, **SCHEDULE)
        held = optimizer.tensors()
    numels = [math.prod(shape) for shape in shapes]
    masters = 0 if dtype == torch.float32 else 4 * sum(numels)
    assert sum(t.nbytes for t in held) == masters + eight_bit_bytes(*numels)


class Library(torch.optim.Optimizer):
    """Stands for bitsandbytes: plain descent that counts in the state it was handed, and makes none of its own."""

    def __init__(self, params: list[torch.Tensor], **defaults: object) -> None:
        super().__init__(params, defaults)
        self.name2qmap: dict[str, torch.Tensor] = {}

    def fill_qmap(self) -> None:
        self.name2qmap = {"dynamic": torch.ones(256), "udynamic": torch.full((256,), 2.0)}

    def step(self) -> None:
        group = self.param_groups[0]
        for p in group["params"]:
            if p.grad is not None:
                self.state[p]["step"] += 1
                self.state[p]["state1"] += 1
                p -= group["lr"] * p.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_8_bit_arithmetic_is_the_librarys_over_our_states(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = types.ModuleType("bitsandbytes")
    package.optim = types.SimpleNamespace(AdamW8bit=Library)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    moved, still = (nn.Parameter(torch.ones(n, dtype=dtype)) for n in (5000, 10))
    schedule = {**SCHEDULE, "lr": 0.5, "warmup_steps": 2}
    optimizer = AdamW8bit([moved, still], weight_decay=0.0, eps=1e-8, **schedule)
    before = [t.data_ptr() for t in optimizer.tensors()]
    stand_in = AdamW8bitStates([moved, still], weight_decay=0.0, eps=1e-8, **schedule)
    assert [t.nbytes for t in optimizer.tensors()] == [t.nbytes for t in stand_in.tensors()]
    assert optimizer.states[0]["qmap2"].unique().tolist() == [2.0]
    for _ in range(2):
        moved.grad = torch.full_like(moved, 0.25)
        optimizer.step()
    assert moved.unique().tolist() == [1 - 0.25 * (0.25 + 0.5)]  # half of the rate, then the whole
    assert still.unique().tolist() == [1.0]
    assert [state["state1"].unique().tolist() for state in optimizer.states] == [[2], [0]]
    assert [t.data_ptr() for t in optimizer.tensors()] == before
    assert all(m.grad is None for m in optimizer.masters)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_8_bit_adamw_is_the_librarys_own() -> None:
    import bitsandbytes

    torch.manual_seed(0)
    start = [torch.randn(n) for n in (5000, 100)]
    ours, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    optimizer = AdamW8bit(ours, weight_decay=0.1, eps=1e-8, **SCHEDULE)
    expected = bitsandbytes.optim.AdamW8bit(theirs, lr=0.1, weight_decay=0.1, eps=1e-8)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        expected.param_groups[0]["lr"] = optimizer.lr
        optimizer.step()
        expected.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    held = {id(t): t for state in expected.state.values() for t in state.values() if isinstance(t, torch.Tensor)}
    assert sum(t.nbytes for t in optimizer.tensors()) == sum(t.nbytes for t in held.values())


def test_8_bit_adamw_without_its_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(CaseError) as caught:
        AdamW8bit(make_parameters(torch.float32), weight_decay=0.0, eps=1e-8, **SCHEDULE)
    assert caught.value.problems == ("optimizer.name is 'adamw8bit': it needs bitsandbytes, which is not installed.",)
