from __future__ import annotations

import pytest
import torch

from rlhfkernels.ops.product import Pair, product, product_reference


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


@pytest.mark.parametrize("also", [False, True])
@pytest.mark.parametrize("adds", [None, False, True])
@pytest.mark.parametrize(
    ("kernels", "dtype"), [("torch", torch.float64), ("torch", torch.float32), ("native", torch.float32)]
)
def test_every_form_is_the_reference(
    request: pytest.FixtureRequest, kernels: str, dtype: torch.dtype, adds: bool | None, also: bool
) -> None:
    """``adds`` is ``None`` where no ``out`` is given."""
    run = request.getfixturevalue("run_in_c") if kernels == "native" else []
    generator = torch.Generator().manual_seed(0)
    # Of rows enough for blocks of columns, and of two of them.
    left, right, wide, low, up = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((400, 24), (24, 1000), (400, 1010), (400, 3), (3, 1000))
    )
    found = []
    for form, of, options in ((product_reference, torch.float64, {}), (product, dtype, {"kernels": kernels})):
        whole = wide.to(of, copy=True)
        out = None if adds is None else whole[:, 4:-6]
        pair = Pair(low.to(of), up.to(of), -0.5) if also else None
        y = form(left.to(of), right.to(of), out=out, scale=1.5, adds=bool(adds), also=pair, **options)
        assert out is None or y.data_ptr() == out.data_ptr()
        found += [y.double(), whole.double()]
    assert bool(run) is (kernels == "native")
    for a, b in zip(found[:2], found[2:], strict=True):
        assert (a - b).norm() < (1e-12 if dtype == torch.float64 else 1e-6) * a.norm()
