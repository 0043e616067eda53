from __future__ import annotations

import pytest
import torch

from rlhfkernels.ops.skinny_linear import skinny_linear, skinny_linear_reference


@pytest.mark.parametrize("rows", [1, 2, 5, 33])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_it_equals_the_reference_in_float64(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 24, generator=generator).to(dtype)
    weight = torch.randn(40, 24, generator=generator).to(dtype)
    found = skinny_linear(x, weight)
    expected = skinny_linear_reference(x.double(), weight.double())
    assert found.shape == (40, rows)
    assert (found.double() - expected).norm() / expected.norm() < tolerance
