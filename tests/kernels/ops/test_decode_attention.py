from __future__ import annotations

import pytest
import torch

from rlhfkernels.ops import decode_attention as module
from rlhfkernels.ops.decode_attention import decode_attention, decode_attention_reference, without_plans


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_it_equals_the_reference_in_float64(
    heads: int, kv_heads: int, masked: bool, packed: bool, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(heads)
    b, n, e = 3, 7, 8
    query = torch.randn(b, heads, e, generator=generator).to(dtype)
    cache = torch.randn(2, b, kv_heads, n + 4, e, generator=generator).to(dtype)
    keys, values = cache[0, :, :, :n], cache[1, :, :, :n]  # views, as in decoding
    mask = torch.arange(n) >= torch.tensor([0, 2, 6])[:, None] if masked else None
    if packed:  # as on an accelerator
        found = module._packed(query, keys, values, 0.3, mask)
    else:
        found = decode_attention(query, keys, values, scale=0.3, mask=mask)
    expected = decode_attention_reference(query.double(), keys.double(), values.double(), scale=0.3, mask=mask)
    assert found.shape == (b, heads, e)
    assert (found.double() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_mask_may_be_added_to_the_scores(dtype: torch.dtype, rows: int, packed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(3, 4, 8, generator=generator).to(dtype)
    keys, values = torch.randn(2, 3, 2, 7, 8, generator=generator).to(dtype)
    attended = torch.arange(7) >= torch.tensor([0, 2, 6])[:rows, None]
    added = torch.zeros(rows, 7, dtype=dtype).masked_fill_(~attended, float("-inf"))
    if packed:
        found = module._packed(query, keys, values, 0.3, added)
    else:
        found = decode_attention(query, keys, values, scale=0.3, mask=added)
    wide = query.double(), keys.double(), values.double()
    for mask in (attended, added.double()):
        expected = decode_attention_reference(*wide, scale=0.3, mask=mask)
        assert (found.double() - expected).norm() / expected.norm() < (1e-12 if dtype == torch.float64 else 2e-2)


def test_the_reference_is_torchs_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 8, generator=generator, dtype=torch.float64)
    keys, values = torch.randn(2, 2, 2, 5, 8, generator=generator, dtype=torch.float64)
    found = decode_attention_reference(query, keys, values, scale=8**-0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=True)
    torch.testing.assert_close(found, expected.squeeze(2))


def test_decode_on_cuda_leaves_out_cudnn_and_nothing_else() -> None:
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    with without_plans(torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
    with without_plans(torch.device("cpu")):
        assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
