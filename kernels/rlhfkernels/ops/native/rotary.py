"""The form in C of ``rlhfkernels.ops.rotary``."""

from __future__ import annotations

import torch

from rlhfkernels.ops.heads import RotaryPart
from rlhfkernels.ops.native.launch import launch
from rlhfkernels.ops.native.structures import Rotary


def turn(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, part: RotaryPart, way: float) -> None:
    """Rotates [m, n] in place by tables [1 or m / t, t, s], or back where ``way`` is -1."""
    m, n = x.shape
    launch(
        "rotary",
        Rotary,
        m,
        x=x,
        cos=cos.contiguous(),
        sin=signed_sin.contiguous(),
        rows=m,
        table_rows=cos.shape[0] * cos.shape[1],
        blocks=part.blocks,
        groups=part.groups,
        rotated=part.rotated,
        size=n // (part.blocks * part.groups),
        turned=cos.shape[-1],
        way=way,
    )
