"""Attention of four full sequences."""

from __future__ import annotations

from typing import Any

import torch

from rlhfkernels.ops.attention_mask import AttentionSpan, CausalMask
from rlhfkernels.ops.qkv_layout import QkvLayout


def test_causal_attention(timed: Any, draw: Any, size: Any, run_op: Any, direction: str) -> None:
    qkv = draw(size.rows, sum(size.qkv))
    mask = CausalMask(torch.empty(4, size.rows // 4, device=qkv.device), None)
    span = AttentionSpan(start=0, window=None, scale=size.head_size**-0.5)
    timed(lambda: run_op(qkv, QkvLayout(size.heads, size.kv_heads, size.head_size), mask, span), [qkv])
