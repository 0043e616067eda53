"""One new query a row over as many positions as a full length has."""

from __future__ import annotations

from typing import Any

import torch

from rlhfkernels.ops.decode_attention import decode_attention, decode_attention_reference
from rlhfkernels.ops.heads import Heads

FORMS = {"op": decode_attention, "reference": decode_attention_reference}


def native(tape: Any, query: Any, keys: Any, values: Any, *, scale: float) -> tuple[Any, dict[str, Any]]:
    """Writes the last position's keys and values into the cache too."""
    qkv = torch.cat([query.flatten(1), keys[:, :, -1].flatten(1), values[:, :, -1].flatten(1)], 1)
    scores = query.new_empty(*query.shape[:2], keys.shape[2])
    out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
    heads = Heads(query.shape[1], keys.shape[1], query.shape[2])
    tape.decode_attention(qkv, out, keys, values, scores, heads=heads, turns=None, window=None, scale=scale)
    return out.view(query.shape), {"written": keys.shape[2] - 1}


def test_decode_attention(timed: Any, draw: Any, size: Any, form: Any) -> None:
    query = draw(size.few, size.heads, size.head_size)
    keys, values = (draw(size.few, size.kv_heads, size.rows, size.head_size) for _ in range(2))
    timed(lambda: form(query, keys, values, scale=size.head_size**-0.5))
