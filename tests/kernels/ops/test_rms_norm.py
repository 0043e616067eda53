from __future__ import annotations

import pytest
import torch

from rlhfkernels.ops.rms_norm import rms_norm, rms_norm_reference


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16)])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_values_and_gradients_equal_the_reference(shape: tuple[int, ...], trained: tuple[bool, bool]) -> None:
    found = []
    for function in (rms_norm, rms_norm_reference):
        torch.manual_seed(0)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=trained[0])
        weight = torch.randn(16, dtype=torch.float64, requires_grad=trained[1])
        y = function(x, weight, 1e-2)
        (y * torch.randn_like(y)).sum().backward()
        found.append((y.detach(), x.grad, weight.grad))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_other_dtypes_are_near_float64(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(7, 32).to(dtype).requires_grad_(), torch.randn(32).to(dtype)
    exact = x.detach().double().requires_grad_()
    y, expected = rms_norm(x, weight, 1e-5), rms_norm_reference(exact, weight.double(), 1e-5)
    assert y.dtype == dtype
    y.sum().backward()
    expected.sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    assert (y.double() - expected).norm() < tolerance * expected.norm()
    assert (x.grad.double() - exact.grad).norm() < tolerance * exact.grad.norm()


def test_no_grad_gives_the_same_values() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    with_graph = rms_norm(x, weight, 1e-5)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, 1e-5), with_graph)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_few_rows_of_an_accelerator_by_torchs_own_op(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    monkeypatch.setattr("rlhfkernels.ops.rms_norm._is_bound_by_launch", lambda x: True)
    torch.manual_seed(0)
    x, weight = torch.randn(7, 32).to(dtype), torch.randn(32).to(dtype)
    taken: list[object] = []
    own = torch.nn.functional.rms_norm
    monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda *args: taken.append(args) or own(*args))
    found, expected = rms_norm(x, weight, 1e-2), rms_norm_reference(x.double(), weight.double(), 1e-2)
    assert len(taken) == 1
    assert (found.double() - expected).norm() < tolerance * expected.norm()
    rms_norm(x.requires_grad_(), weight, 1e-2).sum().backward()  # with a graph, the own kernels
    assert len(taken) == 1
