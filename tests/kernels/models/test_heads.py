from __future__ import annotations

import pytest
import torch

from rlhfkernels.models.heads import ScalarHead


@pytest.mark.parametrize(("dtype", "wide"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_a_scalar_head_computes_in_float32_or_wider(dtype: str, wide: str) -> None:
    torch.manual_seed(0)
    head = ScalarHead(1024, device=torch.device("cpu"), dtype=getattr(torch, dtype))
    hidden = torch.randn(3, 5, 1024).to(getattr(torch, dtype)).requires_grad_()
    values = head(hidden)
    assert (values.dtype, values.shape) == (getattr(torch, wide), (3, 5))
    expected = hidden.double() @ head.weight.double()[0]
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
    values.sum().backward()
    assert head.weight.grad.dtype == head.weight.dtype
    right = hidden.double().sum((0, 1))
    torch.testing.assert_close(head.weight.grad[0].double(), right.to(head.weight.dtype).double(), rtol=8e-3, atol=1e-5)
