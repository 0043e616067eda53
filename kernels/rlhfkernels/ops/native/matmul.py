"""Matmul in C."""

from __future__ import annotations

import functools

import torch

from rlhfkernels.ops.blocked_matmul import blocked_matmul
from rlhfkernels.ops.native.choice import fastest
from rlhfkernels.ops.native.launch import check_shape, launch, scratch_size
from rlhfkernels.ops.native.structures import Matmul

# Below this work the call costs more than the matmul, below this number of rows packing does.
_MIN_MULTIPLY_ADDS, _MIN_ROWS = 2**20, 24


def supports(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> bool:
    """Returns whether the strides are supported and the C is faster than torch."""
    m, n = out.shape
    if m < _MIN_ROWS or m * n * left.shape[1] < _MIN_MULTIPLY_ADDS or not beats_torch():
        return False
    return out.stride(1) == 1 and 1 in right.stride()


def beats_torch() -> bool:
    """Returns whether the C is faster than torch on this machine, by a measurement that is made once.

    Raises:
        ValueError: the environment variable that forces a matmul has another value.
    """
    return _fastest(torch.get_num_threads()) == "native"


@functools.cache
def _fastest(num_threads: int) -> str:
    return fastest({"native": matmul, "torch": blocked_matmul}, num_threads)


def matmul(
    left: torch.Tensor,
    right: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float = 1.0,
    accumulate: bool = False,
    low_rank: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> None:
    """Computes ``out = scale · (left right + low_rank)``, or adds it to ``out``.

    Args:
        left: [m, k], any strides.
        right: [k, n], one stride is 1.
        out: [m, n], column stride 1.
        scale: multiplies the result.
        accumulate: add to ``out``.
        low_rank: [m, r], [r, n] and the scale of their product, which is part of the same sums.

    Raises:
        ValueError: a shape, a dtype or the strides of ``out`` do not fit.
    """
    (m, n), k = out.shape, left.shape[1]
    check_shape("left", left, m, k)
    check_shape("right", right, k, n)
    if n > 1 and out.stride(1) != 1:
        raise ValueError(f"out has strides {out.stride()}: its column stride must be 1.")
    num_threads = torch.get_num_threads()
    numbers: dict[str, float] = {"rank": 0}
    low_a = low_b = None
    if low_rank is not None:
        low_a, low_b, low_scale = low_rank
        rank = low_a.shape[1]
        check_shape("low_a", low_a, m, rank)
        check_shape("low_b", low_b, rank, n)
        numbers = {"rank": rank, "low_scale": low_scale}
        numbers |= {"low_a_row": low_a.stride(0), "low_a_column": low_a.stride(1)}
        numbers |= {"low_b_row": low_b.stride(0), "low_b_column": low_b.stride(1)}
    launch(
        "matmul",
        Matmul,
        num_threads,
        True,
        a=left,
        b=right,
        low_a=low_a,
        low_b=low_b,
        out=out,
        scratch=out.new_empty(num_threads * scratch_size("matmul", m, int(numbers["rank"]))),
        rows=m,
        columns=n,
        inner=k,
        a_row=left.stride(0),
        a_column=left.stride(1),
        b_row=right.stride(0),
        b_column=right.stride(1),
        out_row=out.stride(0),
        accumulate=accumulate,
        scale=scale,
        **numbers,
    )
