"""One new query a row over as many positions as a full length has."""

from __future__ import annotations

from typing import Any

from rlhfkernels.ops.decode_attention import decode_attention, decode_attention_reference

FORMS = {"op": decode_attention, "reference": decode_attention_reference}


def test_decode_attention(timed: Any, draw: Any, size: Any, form: Any) -> None:
    query = draw(size.few, size.heads, size.head_size)
    keys, values = (draw(size.few, size.kv_heads, size.rows, size.head_size) for _ in range(2))
    timed(lambda: form(query, keys, values, scale=size.head_size**-0.5))
