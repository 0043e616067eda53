from __future__ import annotations

import pytest
import torch

from rlhfkernels.ops.swiglu import swiglu, swiglu_reference


def test_values_and_gradients_equal_the_reference() -> None:
    found = []
    for function in (swiglu, swiglu_reference):
        torch.manual_seed(0)
        x = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
        y = function(x)
        (y * torch.randn_like(y)).sum().backward()
        found.append((y.detach(), x.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_other_dtypes_are_near_float64(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 20).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = swiglu(x), swiglu_reference(exact)
    y.sum().backward()
    expected.sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    assert (y.double() - expected).norm() < tolerance * expected.norm()
    assert (x.grad.double() - exact.grad).norm() < tolerance * exact.grad.norm()


def test_it_saves_only_its_input() -> None:
    saved: list[torch.Tensor] = []
    x = torch.randn(6, 20, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]
