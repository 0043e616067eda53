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
from rlhfkernels.training.adamw_8bit import AdamW8bit, AdamW8bitStates

SCHEDULE = {"lr": 0.1, "warmup_steps": 0, "total_steps": 1000, "max_grad_norm": 1e9}


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
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
            b.grad = a.grad.clone()
        expected.param_groups[0]["lr"] = optimizer.lr
        optimizer.step()
        expected.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    held = {id(t): t for state in expected.state.values() for t in state.values() if isinstance(t, torch.Tensor)}
    assert sum(t.nbytes for t in optimizer.tensors()) == sum(t.nbytes for t in held.values())


def test_8_bit_adamw_without_its_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(CaseError) as caught:
        AdamW8bit([nn.Parameter(torch.ones(3))], weight_decay=0.0, eps=1e-8, **SCHEDULE)
    assert caught.value.problems == ("optimizer.name is 'adamw8bit': it needs bitsandbytes, which is not installed.",)


def test_a_rank_without_parameters_has_no_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's optimizers refuse an empty list, and so does the library."""
    package = types.ModuleType("bitsandbytes")
    package.optim = types.SimpleNamespace(AdamW8bit=Library)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    optimizer = AdamW8bit([], weight_decay=0.0, eps=1e-8, **SCHEDULE)
    optimizer.step()
    assert optimizer.tensors() == []
