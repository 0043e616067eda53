"""Causal attention in C, forward and backward."""

from __future__ import annotations

import torch

from rlhfkernels.ops.attention_mask import AttentionSpan, CausalMask
from rlhfkernels.ops.native.launch import check_shape, launch, scratch_size
from rlhfkernels.ops.native.structures import CausalAttention
from rlhfkernels.ops.qkv_layout import QkvLayout


def forward(
    qkv: torch.Tensor, layout: QkvLayout, mask: CausalMask, span: AttentionSpan, *, with_logsumexp: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the attention output [b (t − start), h e], and the logsumexp of the scores [b, h, t] where asked for."""
    out = qkv.new_empty(mask.b * (mask.t - span.start), layout.num_heads * layout.head_size)
    logsumexp = qkv.new_empty(mask.b, layout.num_heads, mask.t) if with_logsumexp else None
    _run("causal_attention", qkv, layout, mask, span, out=out, logsumexp=logsumexp)
    return out, logsumexp


def backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    logsumexp: torch.Tensor,
    layout: QkvLayout,
    mask: CausalMask,
    span: AttentionSpan,
) -> torch.Tensor:
    """Returns the gradient of ``qkv``, [m, n]."""
    grad_qkv = torch.empty_like(qkv)
    tensors = {"logsumexp": logsumexp, "grad_out": grad.contiguous(), "grad_qkv": grad_qkv}
    _run("causal_attention_backward", qkv, layout, mask, span, **tensors)
    return grad_qkv


def _run(
    op: str,
    qkv: torch.Tensor,
    layout: QkvLayout,
    mask: CausalMask,
    span: AttentionSpan,
    **tensors: torch.Tensor | None,
) -> None:
    check_shape("qkv", qkv, mask.b * mask.t, layout.width)
    check_shape("mask", mask.padding, mask.b, mask.t)
    num_groups = mask.b * layout.num_kv_heads
    size = scratch_size("causal_attention", mask.t, layout.head_size, int("grad_qkv" in tensors))
    launch(
        op,
        CausalAttention,
        num_groups,
        qkv=qkv,
        mask=None if mask.padding is None else mask.padding.contiguous(),
        scratch=qkv.new_empty(min(num_groups, torch.get_num_threads()) * size),
        **tensors,
        batch=mask.b,
        length=mask.t,
        stride=layout.width,
        heads=layout.num_heads,
        kv_heads=layout.num_kv_heads,
        size=layout.head_size,
        start=span.start,
        window=span.window or 0,
        head_stride=layout.head_stride,
        key_start=layout.key_start,
        value_start=layout.value_start,
        scratch_size=size,
        scale=span.scale,
    )
