from __future__ import annotations

import pytest
import torch
from torch import nn

from rlhfkernels.models.heads import LmHead, ScalarHead


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


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.5, 3.0)])
def test_a_decode_steps_logits_are_those_of_the_forward_pass(
    num_rows: int, has_bias: bool, scale: float, softcap: float | None
) -> None:
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(11, 5).double()), nn.Parameter(torch.randn(11).double())
    head = LmHead(weight, bias if has_bias else None, scale=scale, softcap=softcap)
    hidden = torch.randn(num_rows, 5).double()
    torch.testing.assert_close(head.decode_logits(hidden, backend="torch"), head(hidden).detach())
