"""Four sequences, all of whose positions attend."""

from __future__ import annotations

import functools
from typing import Any

import torch

from rlhfkernels.ops.causal_attention import causal_attention, causal_attention_reference
from rlhfkernels.ops.heads import Heads
from rlhfkernels.ops.sight import Reach, Sight

FORMS = {"op": causal_attention, "reference": causal_attention_reference}
IN_C = functools.partial(causal_attention, kernels="native")


def test_causal_attention(timed: Any, draw: Any, size: Any, form: Any, direction: str) -> None:
    qkv = draw(size.rows, sum(size.qkv))
    sight = Sight(torch.empty(4, size.rows // 4, device=qkv.device), None)
    reach = Reach(start=0, window=None, scale=size.head_size**-0.5)
    timed(lambda: form(qkv, Heads(size.heads, size.kv_heads, size.head_size), sight, reach), [qkv])
