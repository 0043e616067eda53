"""The form in C of ``rlhfkernels.ops.product``."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from rlhfkernels.ops.native.build import library
from rlhfkernels.ops.native.launch import launch
from rlhfkernels.ops.native.structures import Product

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
    left: torch.Tensor,
    right: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float = 1.0,
    adds: bool = False,
    also: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> None:
    """``out = scale · left right``, or adds it: [m, k] by [k, n], of which one stride is 1, to [m, n], rows dense.

    ``also`` is another pair and what multiplies its product, which is part of the same sums.
    """
    (m, n), k = out.shape, left.shape[1]
    threads = torch.get_num_threads()
    numbers: dict[str, float] = {"also_inner": 0}
    if also is not None:
        numbers = {"also_inner": also[0].shape[1], "also_scale": also[2]}
        numbers |= {"also_a_row": also[0].stride(0), "also_a_column": also[0].stride(1)}
        numbers |= {"also_b_row": also[1].stride(0), "also_b_column": also[1].stride(1)}
    launch(
        "product_of_matrices",
        Product,
        threads,
        True,
        a=left,
        b=right,
        also_a=None if also is None else also[0],
        also_b=None if also is None else also[1],
        out=out,
        scratch=out.new_empty(threads * _scratch_size(m, int(numbers["also_inner"]))),
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
        **numbers,
    )


@functools.cache
def _scratch_size(rows: int, also_inner: int) -> int:
    """Numbers that one thread needs."""
    function = library().product_scratch
    function.restype = ctypes.c_int64
    return int(function(ctypes.c_int64(rows), ctypes.c_int64(also_inner)))
