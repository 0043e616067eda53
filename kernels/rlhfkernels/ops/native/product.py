"""The form in C of ``rlhfkernels.ops.product``."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from rlhfkernels.ops.native.build import library
from rlhfkernels.ops.native.launch import launch, operands

Product = operands(
    "product", "a b out scratch", "rows columns inner a_row a_column b_row b_column out_row adds", "scale"
)
# Below, a call takes as long as the product; and with fewer rows, packing does.
_LEAST_WORK, _FEWEST_ROWS = 2**20, 24


def covers(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether it is this form's: whether its memory lies as this form takes it, and it is the faster one."""
    m, n = out.shape
    if m < _FEWEST_ROWS or m * n * left.shape[1] < _LEAST_WORK or not beats_library():
        return False
    return out.stride(1) == 1 and 1 in right.stride()


@functools.cache
def beats_library() -> bool:
    """Whether it is faster than the library on this processor: where there are 512-bit vectors that MKL leaves unused.

    MKL takes them on Intel's processors only.
    """
    cpuinfo = Path("/proc/cpuinfo")
    return lanes() == 16 and cpuinfo.exists() and "GenuineIntel" not in cpuinfo.read_text()


def lanes() -> int:
    """Numbers of a vector."""
    count = library().lanes
    count.restype = ctypes.c_int64
    return int(count())


def multiply(
    left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, *, scale: float = 1.0, adds: bool = False
) -> None:
    """``out = scale · left right``, or adds it: [m, k] by [k, n], of which one stride is 1, to [m, n], rows dense."""
    (m, n), k = out.shape, left.shape[1]
    threads = torch.get_num_threads()
    launch(
        "product_of_matrices",
        Product,
        threads,
        True,
        a=left,
        b=right,
        out=out,
        scratch=out.new_empty(threads * _scratch_size(m)),
        rows=m,
        columns=n,
        inner=k,
        a_row=left.stride(0),
        a_column=left.stride(1),
        b_row=right.stride(0),
        b_column=right.stride(1),
        out_row=out.stride(0),
        adds=adds,
        scale=scale,
    )


@functools.cache
def _scratch_size(rows: int) -> int:
    """Numbers that one thread needs."""
    function = library().product_scratch
    function.restype = ctypes.c_int64
    return int(function(ctypes.c_int64(rows)))
