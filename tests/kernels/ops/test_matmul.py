from __future__ import annotations

import pytest
import torch

from rlhfkernels.ops.matmul import LowRankTerm, matmul, matmul_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("m", "n"), [(1, 5), (400, 768), (400, 769), (383, 1000), (384, 1000), (400, 1536), (400, 4100)]
)
@pytest.mark.parametrize("transposed", [True, False])
def test_it_equals_the_reference(m: int, n: int, transposed: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, 24, generator=generator, dtype=torch.float64)
    weight = torch.randn(*((n, 24) if transposed else (24, n)), generator=generator, dtype=torch.float64)
    weight = weight.t() if transposed else weight
    expected = matmul_reference(x, weight)
    found = matmul(x.to(dtype), weight.to(dtype))
    assert found.dtype == dtype
    assert found.is_contiguous()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.5}[dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0.0)
    in_3d = matmul(x.to(dtype).view(1, m, -1), weight.to(dtype))
    torch.testing.assert_close(in_3d[0].double(), expected, atol=tolerance, rtol=0.0)


@pytest.mark.parametrize("with_low_rank", [False, True])
@pytest.mark.parametrize("accumulate", [None, False, True])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float64), ("torch", torch.float32), ("native", torch.float32)]
)
def test_out_scale_accumulate_and_low_rank_equal_the_reference(
    request: pytest.FixtureRequest, backend: str, dtype: torch.dtype, accumulate: bool | None, with_low_rank: bool
) -> None:
    """``accumulate`` is ``None`` without ``out``."""
    calls = request.getfixturevalue("native_calls") if backend == "native" else []
    generator = torch.Generator().manual_seed(0)
    # Enough rows and columns for two blocks of columns.
    left, right, wide, low, up = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((400, 24), (24, 1000), (400, 1010), (400, 3), (3, 1000))
    )
    found = []
    for function, of, options in ((matmul_reference, torch.float64, {}), (matmul, dtype, {"backend": backend})):
        whole = wide.to(of, copy=True)
        out = None if accumulate is None else whole[:, 4:-6]
        term = LowRankTerm(low.to(of), up.to(of), -0.5) if with_low_rank else None
        y = function(
            left.to(of), right.to(of), out=out, scale=1.5, accumulate=bool(accumulate), low_rank=term, **options
        )
        assert out is None or y.data_ptr() == out.data_ptr()
        found += [y.double(), whole.double()]
    assert bool(calls) is (backend == "native")
    for a, b in zip(found[:2], found[2:], strict=True):
        assert (a - b).norm() < (1e-12 if dtype == torch.float64 else 1e-6) * a.norm()
