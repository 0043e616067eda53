"""Rotary position embedding in place; a thread reads, rotates and writes pairs of elements.

Shapes: m = positions of all rows, t = positions of a row, n = elements of a position, e = head size, s = rotated
elements of a head.
"""

import torch
import triton
import triton.language as tl

from rlhfkernels.ops.qkv_layout import RotaryPart
from rlhfkernels.ops.triton.launch import block_size, compile_options, on_device_of

_MAX_BLOCK = 1024


@triton.jit
def _rotate_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    row_stride,
    table_rows,
    pairs,
    direction,
    groups: tl.constexpr,
    rotated: tl.constexpr,
    head_size: tl.constexpr,
    half: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * block + tl.arange(0, block)
    inside = pair < pairs
    # Pairs are numbered head by head over the rotated heads.
    column = pair % half
    head = pair // half
    head = (head // rotated) * groups + head % rotated
    first_ptr = x_ptr + row * row_stride + head * head_size + column
    first = tl.load(first_ptr, mask=inside, other=0.0)
    second = tl.load(first_ptr + half, mask=inside, other=0.0).to(tl.float32)
    wide = first.to(tl.float32)
    table = (row % table_rows) * 2 * half + column
    cos = tl.load(cos_ptr + table, mask=inside, other=0.0).to(tl.float32)
    # The second half of the signed table is the sine without a sign.
    sin = tl.load(sin_ptr + table + half, mask=inside, other=0.0).to(tl.float32) * direction
    tl.store(first_ptr, (wide * cos - second * sin).to(first.dtype), mask=inside)
    tl.store(first_ptr + half, (second * cos + wide * sin).to(first.dtype), mask=inside)


def supports(x: torch.Tensor) -> bool:
    """Returns whether the elements of a position are adjacent."""
    return x.stride(-1) == 1


def rotate_(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, part: RotaryPart, direction: float) -> None:
    """Rotates the part of ``x`` [m, n] in place; ``direction`` is 1, or -1 for the inverse. See ``rotary_``."""
    half = cos.shape[-1] // 2
    pairs = part.blocks * part.rotated * half
    block = block_size(pairs, _MAX_BLOCK)
    with on_device_of(x):
        _rotate_kernel[(x.shape[0], triton.cdiv(pairs, block))](
            x,
            cos.contiguous(),
            signed_sin.contiguous(),
            x.stride(0),
            cos.shape[0] * cos.shape[1],
            pairs,
            direction,
            groups=part.groups,
            rotated=part.rotated,
            head_size=x.shape[-1] // (part.blocks * part.groups),
            half=half,
            block=block,
            **compile_options(block),
        )
