"""Root-mean-square normalisation, one program a row: the row is read once, forward as backward.

Shapes: n = rows, d = hidden size.
"""

import torch
import triton
import triton.language as tl

from rlhfkernels.ops.triton.launch import WIDEST_ROW, block_of, on_device_of, options

# A weight's gradient is summed over so many runs of rows at most, then over the runs: no atomics, the same bits always.
_MOST_RUNS = 512


@triton.jit
def _forward_kernel(x_ptr, weight_ptr, y_ptr, inverse_ptr, d, eps, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < d
    x = tl.load(x_ptr + row * d + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=0) / d + eps)
    tl.store(inverse_ptr + row, inverse)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    normalised = (wide * inverse).to(x.dtype).to(tl.float32)  # rounded before it is scaled, as in Llama
    tl.store(y_ptr + row * d + columns, (normalised * weight).to(x.dtype), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    inverse_ptr,
    grad_x_ptr,
    sums_ptr,
    n,
    d,
    rows_of_run,
    with_x: tl.constexpr,
    with_weight: tl.constexpr,
    block: tl.constexpr,
):
    run = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < d
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((block,), dtype=tl.float32)
    for i in range(rows_of_run):
        row = run * rows_of_run + i
        here = columns < tl.where(row < n, d, 0)
        x = tl.load(x_ptr + row * d + columns, mask=here, other=0.0)
        wide = x.to(tl.float32)
        grad = tl.load(grad_ptr + row * d + columns, mask=here, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + tl.minimum(row, n - 1))
        if with_weight:
            total += (wide * inverse).to(x.dtype).to(tl.float32) * grad
        if with_x:
            # With u = x · inverse: dx = inverse · (g − u · mean(g · u)), g = grad · weight.
            scaled = grad * weight
            mean = tl.sum(scaled * wide, axis=0) * inverse * inverse / d
            grad_x = (scaled - wide * mean) * inverse
            tl.store(grad_x_ptr + row * d + columns, grad_x.to(x.dtype), mask=here)
    if with_weight:
        tl.store(sums_ptr + run * d + columns, total, mask=inside)


def covers(x: torch.Tensor) -> bool:
    """Whether a row is held at once."""
    return x.shape[-1] <= WIDEST_ROW


def forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised rows [..., d], and 1 / √(mean x² + eps) of each, [..., 1] float32."""
    rows = _rows(x)
    n, d = rows.shape
    y, inverse = torch.empty_like(rows), rows.new_empty(n, dtype=torch.float32)
    block = block_of(d, WIDEST_ROW)
    with on_device_of(x):
        _forward_kernel[(n,)](rows, weight.contiguous(), y, inverse, d, eps, block=block, **options(block))
    return y.view(x.shape), inverse.view(*x.shape[:-1], 1)


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    inverse: torch.Tensor,
    needed: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of ``x`` [..., d] and of ``weight`` [d], those that are needed."""
    with_x, with_weight = needed
    rows = _rows(x)
    n, d = rows.shape
    rows_of_run = max(1, triton.cdiv(n, _MOST_RUNS)) if with_weight else 1
    runs = triton.cdiv(n, rows_of_run)
    # What is not needed is never written: any tensor stands for it.
    grad_x = torch.empty_like(rows) if with_x else rows
    sums = rows.new_empty(runs, d, dtype=torch.float32) if with_weight else inverse
    block = block_of(d, WIDEST_ROW)
    with on_device_of(x):
        _backward_kernel[(runs,)](
            _rows(grad),
            rows,
            weight.contiguous(),
            inverse,
            grad_x,
            sums,
            n,
            d,
            rows_of_run,
            with_x=with_x,
            with_weight=with_weight,
            block=block,
            **options(block),
        )
    return grad_x.view(x.shape) if with_x else None, sums.sum(0).to(weight.dtype) if with_weight else None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., d] to [n, d] with nothing between the rows; a view wherever the op's callers come from."""
    return x.reshape(-1, x.shape[-1]).contiguous()
