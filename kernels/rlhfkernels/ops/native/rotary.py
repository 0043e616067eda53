"""Rotary position embedding in C."""

from __future__ import annotations

import torch

from rlhfkernels.ops.native.launch import check_shape, launch
from rlhfkernels.ops.native.structures import Rotary
from rlhfkernels.ops.qkv_layout import RotaryPart


def rotate_(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, part: RotaryPart, direction: float) -> None:
    """Rotates [m, n] in place by tables [1 or m / t, t, s]; ``direction`` is 1, or -1 for the inverse."""
    m, n = x.shape
    table_rows, rotary_size = cos.shape[0] * cos.shape[1], cos.shape[2]
    check_shape("signed_sin", signed_sin, *cos.shape)
    size = n // (part.blocks * part.groups)
    if rotary_size % 2 or rotary_size > size:
        raise ValueError(f"cos has {rotary_size} columns: it must be an even number of at most {size}.")
    launch(
        "rotary",
        Rotary,
        m,
        x=x,
        cos=cos.contiguous(),
        signed_sin=signed_sin.contiguous(),
        rows=m,
        table_rows=table_rows,
        blocks=part.blocks,
        groups=part.groups,
        rotated_groups=part.rotated,
        size=size,
        rotary_size=rotary_size,
        direction=direction,
    )
