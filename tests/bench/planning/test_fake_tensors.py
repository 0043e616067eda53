from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from rlhfbench.planning import fake_tensors
from rlhfbench.planning.fake_tensors import CachingFakeTensorMode

Op = Callable[[torch.Tensor, torch.Tensor], Any]

OPS: dict[str, Op] = {
    "a new tensor": lambda a, b: a @ b,
    "another dtype": lambda a, b: a.to(torch.bfloat16),
    "a python number": lambda a, b: a + 1,
    "a scalar": lambda a, b: torch.linalg.vector_norm(a),
    "a view": lambda a, b: a.view(4, 12),
    "a view with an offset": lambda a, b: a[2:, 1:],
    "strides": lambda a, b: a.t().contiguous(),
    "several views": lambda a, b: torch.split(a, 3),
    "several new tensors": lambda a, b: torch.native_layer_norm(a, (6,), b[0, :6], b[0, :6], 1e-5),
    "a list of tensors": lambda a, b: torch.cat([a, a[:1]]),
    "out": lambda a, b: torch.mm(a, b, out=a.new_empty(8, 7)),
    "in place": lambda a, b: a.mul_(2.0),
    "the argument": lambda a, b: a.detach(),
    "no tensor": lambda a, b: torch.zeros(3),
}


@pytest.fixture(autouse=True)
def no_recipes() -> Iterator[None]:
    fake_tensors._recipes.clear()
    yield
    fake_tensors._recipes.clear()


def described(mode: FakeTensorMode, op: Op) -> list[Any]:
    """All that tells the outputs of ``op`` apart, with the argument whose storage each has."""
    with mode, torch.no_grad():
        a, b = torch.empty(8, 6), torch.empty(6, 7)
        result = op(a, b)
        results = result if isinstance(result, (list, tuple)) else [result]
        found = []
        for each in results:
            assert isinstance(each, FakeTensor)
            assert each.fake_mode is mode
            address = each.untyped_storage()._cdata
            owner = [i for i, x in enumerate((a, b)) if x.untyped_storage()._cdata == address]
            layout = (each.shape, each.stride(), each.storage_offset(), each.untyped_storage().nbytes())
            found.append((*layout, each.dtype, each.device, each.requires_grad, owner, each is a))
        return found


@pytest.mark.parametrize("name", OPS)
def test_a_recipe_makes_what_torch_makes(name: str) -> None:
    expected = described(FakeTensorMode(), OPS[name])
    assert described(CachingFakeTensorMode(), OPS[name]) == expected
    num_recipes = len(fake_tensors._recipes)
    assert described(CachingFakeTensorMode(), OPS[name]) == expected
    assert 0 < len(fake_tensors._recipes) == num_recipes, "the second time torch was asked again"


@pytest.mark.parametrize("name", OPS)
def test_torch_is_asked_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    dispatch = FakeTensorMode.dispatch

    def counted(mode: FakeTensorMode, func: Any, *args: Any) -> Any:
        asked.append(func)
        return dispatch(mode, func, *args)

    described(CachingFakeTensorMode(), OPS[name])
    monkeypatch.setattr(FakeTensorMode, "dispatch", counted)
    described(CachingFakeTensorMode(), OPS[name])
    assert asked == []


def test_numbers_that_are_equal_and_of_other_types_are_told_apart() -> None:
    with CachingFakeTensorMode():
        a = torch.empty(3, dtype=torch.int64)
        assert [(a * factor).dtype for factor in (2, 2.0, True)] == [torch.int64, torch.float32, torch.int64]


def test_the_default_dtype_is_told_apart() -> None:
    with CachingFakeTensorMode():
        assert torch.zeros(2).dtype == torch.float32
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert torch.zeros(2).dtype == torch.bfloat16
        finally:
            torch.set_default_dtype(torch.float32)


def test_an_op_that_changes_the_shape_of_its_argument_has_no_recipe() -> None:
    for _ in range(2):
        with CachingFakeTensorMode():
            a = torch.empty(8, 6)
            assert torch.mm(torch.empty(2, 3), torch.empty(3, 4), out=torch.empty(0)).shape == (2, 4)
            assert a.t_().shape == (6, 8)
            assert a.resize_(3, 3).shape == (3, 3)


def test_contents_that_are_known_stay_known() -> None:
    for value in (3, 4):
        with CachingFakeTensorMode():
            assert (torch.tensor(value) + 1).item() == value + 1


def test_gradients_flow() -> None:
    for _ in range(2):
        with CachingFakeTensorMode():
            weight = torch.nn.Parameter(torch.empty(6, 7))
            (torch.empty(8, 6) @ weight).relu().sum().backward()
            assert weight.grad is not None
            assert weight.grad.shape == (6, 7)


def test_the_number_of_recipes_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_tensors, "_MAX_RECIPES", 5)
    with CachingFakeTensorMode():
        for size in range(12):
            assert torch.zeros(size).shape == (size,)
    assert len(fake_tensors._recipes) <= 5
