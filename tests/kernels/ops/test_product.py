from __future__ import annotations

import pytest
import torch

from rlhfkernels.ops.product import product, product_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("m", "n"), [(1, 5), (400, 768), (400, 769), (383, 1000), (384, 1000), (400, 1536), (400, 4100)]
)
@pytest.mark.parametrize("transposed", [True, False])
def test_it_is_the_plain_product(m: int, n: int, transposed: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, 24, generator=generator, dtype=torch.float64)
    weight = torch.randn(*((n, 24) if transposed else (24, n)), generator=generator, dtype=torch.float64)
    weight = weight.t() if transposed else weight
    expected = product_reference(x, weight)
    found = product(x.to(dtype), weight.to(dtype))
    assert found.dtype == dtype
    assert found.is_contiguous()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.5}[dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0.0)
    in_two = product(x.to(dtype).view(1, m, -1), weight.to(dtype))
    torch.testing.assert_close(in_two[0].double(), expected, atol=tolerance, rtol=0.0)
