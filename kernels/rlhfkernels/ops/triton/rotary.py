"""Rotary positions in place: a pair of numbers is read, turned and written by one thread.

Shapes: m = positions of all rows, t = of one row, n = numbers of a position, e = head size, s = its rotated part.
"""

import torch
import triton
import triton.language as tl

from rlhfkernels.ops.heads import RotaryPart
from rlhfkernels.ops.triton.launch import block_of, on_device_of, options

_WIDEST = 1024


@triton.jit
def _turn_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    row_stride,
    table_rows,
    pairs,
    way,
    groups: tl.constexpr,
    rotated: tl.constexpr,
    head_size: tl.constexpr,
    half: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * block + tl.arange(0, block)
    inside = pair < pairs
    # Pairs are counted head by head over the heads that are rotated.
    column = pair % half
    head = pair // half
    head = (head // rotated) * groups + head % rotated
    first_ptr = x_ptr + row * row_stride + head * head_size + column
    first = tl.load(first_ptr, mask=inside, other=0.0)
    second = tl.load(first_ptr + half, mask=inside, other=0.0).to(tl.float32)
    wide = first.to(tl.float32)
    table = (row % table_rows) * 2 * half + column
    cos = tl.load(cos_ptr + table, mask=inside, other=0.0).to(tl.float32)
    # Of the signed table the second half is the sine as it is.
    sin = tl.load(sin_ptr + table + half, mask=inside, other=0.0).to(tl.float32) * way
    tl.store(first_ptr, (wide * cos - second * sin).to(first.dtype), mask=inside)
    tl.store(first_ptr + half, (second * cos + wide * sin).to(first.dtype), mask=inside)


def covers(x: torch.Tensor) -> bool:
    """Whether the numbers of a position lie side by side."""
    return x.stride(-1) == 1


def turn(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, part: RotaryPart, way: float) -> None:
    """Rotates the part of ``x`` [m, n] in place; ``way`` is 1, or -1 for the inverse. See ``rotary_``."""
    half = cos.shape[-1] // 2
    pairs = part.blocks * part.rotated * half
    block = block_of(pairs, _WIDEST)
    with on_device_of(x):
        _turn_kernel[(x.shape[0], triton.cdiv(pairs, block))](
            x,
            cos.contiguous(),
            signed_sin.contiguous(),
            x.stride(0),
            cos.shape[0] * cos.shape[1],
            pairs,
            way,
            groups=part.groups,
            rotated=part.rotated,
            head_size=x.shape[-1] // (part.blocks * part.groups),
            half=half,
            block=block,
            **options(block),
        )
