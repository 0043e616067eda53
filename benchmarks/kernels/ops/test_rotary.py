"""Rotation of queries and keys in the output of the QKV projection. All implementations read a copy."""

from __future__ import annotations

from typing import Any

import torch

from rlhfkernels.ops.qkv_layout import QkvLayout
from rlhfkernels.ops.rotary import make_signed_sin


def adapt(function: Any) -> Any:
    def run(x: Any, cos: Any, sin: Any, layout: QkvLayout) -> Any:
        return function(x.clone(), cos, make_signed_sin(sin), layout.rotary_part)

    return run


def liger(x: Any, cos: Any, sin: Any, layout: QkvLayout) -> Any:
    from liger_kernel.transformers.functional import liger_rope

    query, key, _ = (part[None].transpose(1, 2) for part in layout.split(x.clone()))
    return liger_rope(query, key, cos, sin)


def test_rotary(timed: Any, draw: Any, size: Any, run_op: Any, direction: str) -> None:
    x = draw(size.rows, sum(size.qkv))
    angles = torch.rand_like(draw(1, size.rows, size.head_size // 2)).repeat(1, 1, 2)
    layout = QkvLayout(size.heads, size.kv_heads, size.head_size)
    timed(lambda: run_op(x, angles.cos(), angles.sin(), layout), [x])
