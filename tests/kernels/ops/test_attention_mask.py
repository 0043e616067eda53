from __future__ import annotations

import pytest
import torch

from rlhfkernels.ops.attention_mask import AttentionSpan, CausalMask
from rlhfkernels.ops.causal_attention import causal_attention
from rlhfkernels.ops.qkv_layout import QkvLayout

LENGTH = 21


def padded(window: int | None) -> CausalMask:
    padding = (torch.arange(LENGTH) >= torch.tensor([[0], [4]])).long()
    return CausalMask(torch.zeros(2, LENGTH), None if window else padding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("window", [None, 5])
def test_the_bias_is_the_mask_in_a_dtype(window: int | None, dtype: torch.dtype) -> None:
    mask = padded(window)
    bias, attended = mask.bias(window, dtype), mask.mask(window)
    assert bias is not None
    assert attended is not None
    assert bias.dtype == dtype
    assert torch.equal(bias, torch.where(attended, 0.0, float("-inf")).to(dtype))
    # As torch's memory-efficient attention on CUDA wants it, which copies it otherwise.
    assert bias.stride(-1) == 1
    assert all(stride % 8 == 0 for stride in bias.stride()[:-1])


def test_plain_causal_attention_has_no_bias() -> None:
    assert CausalMask(torch.zeros(2, LENGTH), None).bias(None, torch.float32) is None
    assert CausalMask(torch.zeros(2, LENGTH), None).bias(LENGTH, torch.float32) is None


@pytest.mark.parametrize("start", [0, 9])
@pytest.mark.parametrize("window", [None, 5])
def test_all_layers_keep_one_mask_for_the_backward(window: int | None, start: int) -> None:
    layout = QkvLayout(4, 2, 8)
    qkv = torch.randn(2 * LENGTH, layout.width, requires_grad=True)
    mask, span = padded(window), AttentionSpan(start=start, window=window, scale=0.3)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        for _ in range(3):
            causal_attention(qkv, layout, mask, span, backend="torch")
    kept = [t for t in saved if t.shape[-2:] == (LENGTH - start, LENGTH)]
    assert len(kept) == 3
    assert len({t.untyped_storage().data_ptr() for t in kept}) == 1
