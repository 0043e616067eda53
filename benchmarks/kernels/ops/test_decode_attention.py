"""Attention of one new query a row over a cache of full length."""

from __future__ import annotations

from typing import Any

import torch

from rlhfkernels.ops.qkv_layout import QkvLayout


def record_decode_attention(program: Any, query: Any, keys: Any, values: Any, *, scale: float) -> tuple[Any, Any]:
    """Also writes the last position into the cache, as the C does in one op."""
    qkv = torch.cat([query.flatten(1), keys[:, :, -1].flatten(1), values[:, :, -1].flatten(1)], 1)
    scores = query.new_empty(*query.shape[:2], keys.shape[2])
    out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
    layout = QkvLayout(query.shape[1], keys.shape[1], query.shape[2])
    program.decode_attention(qkv, out, keys, values, scores, layout=layout, rotary=None, window=None, scale=scale)
    return out.view(query.shape), {"cache_len": keys.shape[2] - 1}


def test_decode_attention(timed: Any, draw: Any, size: Any, run_op: Any) -> None:
    query = draw(size.decode_rows, size.heads, size.head_size)
    keys, values = (draw(size.decode_rows, size.kv_heads, size.rows, size.head_size) for _ in range(2))
    timed(lambda: run_op(query, keys, values, scale=size.head_size**-0.5))
