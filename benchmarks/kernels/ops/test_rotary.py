"""Queries and keys of a product [m, n] that holds the values too. All forms read a copy: the op turns it in place."""

from __future__ import annotations

import functools
from typing import Any

import torch

from rlhfkernels.ops.heads import RotaryPart
from rlhfkernels.ops.rotary import rotary_, rotary_reference, signed


def op(x: Any, cos: Any, sin: Any, size: Any, kernels: str = "auto") -> Any:
    rotated = size.heads + size.kv_heads
    return rotary_(x.clone(), cos, sin, RotaryPart(1, rotated + size.kv_heads, rotated), kernels=kernels)


def reference(x: Any, cos: Any, sin: Any, size: Any) -> Any:
    heads = x.clone().view(len(x), -1, size.head_size)
    query, key, _ = heads.split([size.heads, size.kv_heads, size.kv_heads], 1)
    return rotary_reference(query, cos[0, :, None], sin[0, :, None]), rotary_reference(
        key, cos[0, :, None], sin[0, :, None]
    )


def liger(x: Any, cos: Any, sin: Any, size: Any) -> Any:
    from liger_kernel.transformers.functional import liger_rope

    heads = x.clone().view(1, len(x), -1, size.head_size).transpose(1, 2)
    query, key, _ = heads.split([size.heads, size.kv_heads, size.kv_heads], 1)
    return liger_rope(query, key, cos, sin)


FORMS = {"op": op, "reference": reference}
IN_C = functools.partial(op, kernels="native")
LIGER = {"liger": liger}


def test_rotary(timed: Any, draw: Any, size: Any, form: Any, direction: str) -> None:
    x = draw(size.rows, sum(size.qkv))
    angles = torch.rand_like(draw(1, size.rows, size.head_size // 2)).repeat(1, 1, 2)
    sin = signed(angles.sin()) if form in (op, IN_C) else angles.sin()
    timed(lambda: form(x, angles.cos(), sin, size), [x])
