"""RMS norm, one program a row; forward and backward read a row once.

Shapes: n = rows, d = hidden size.
"""

import torch
import triton
import triton.language as tl

from rlhfkernels.ops.triton.launch import MAX_ROW_SIZE, block_size, compile_options, on_device_of

# The gradient of the weight is summed within groups of rows, then over the groups: deterministic, without atomics.
_MAX_ROW_GROUPS = 512


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
    normalized = (wide * inverse).to(x.dtype).to(tl.float32)  # rounded before it is scaled, as in Llama
    tl.store(y_ptr + row * d + columns, (normalized * weight).to(x.dtype), mask=inside)


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
    rows_per_group,
    with_x: tl.constexpr,
    with_weight: tl.constexpr,
    block: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < d
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((block,), dtype=tl.float32)
    for i in range(rows_per_group):
        row = group * rows_per_group + i
        valid = columns < tl.where(row < n, d, 0)
        x = tl.load(x_ptr + row * d + columns, mask=valid, other=0.0)
        wide = x.to(tl.float32)
        grad = tl.load(grad_ptr + row * d + columns, mask=valid, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + tl.minimum(row, n - 1))
        if with_weight:
            total += (wide * inverse).to(x.dtype).to(tl.float32) * grad
        if with_x:
            # With u = x · inverse and g = grad · weight: dx = inverse · (g − u · mean(g · u)).
            scaled = grad * weight
            mean = tl.sum(scaled * wide, axis=0) * inverse * inverse / d
            grad_x = (scaled - wide * mean) * inverse
            tl.store(grad_x_ptr + row * d + columns, grad_x.to(x.dtype), mask=valid)
    if with_weight:
        tl.store(sums_ptr + group * d + columns, total, mask=inside)


def supports(x: torch.Tensor) -> bool:
    """Returns whether a row fits into registers."""
    return x.shape[-1] <= MAX_ROW_SIZE


def forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the normalized rows [..., d], and 1 / √(mean x² + eps) of each row, [..., 1] float32."""
    rows = _rows(x)
    n, d = rows.shape
    y, inverse = torch.empty_like(rows), rows.new_empty(n, dtype=torch.float32)
    block = block_size(d, MAX_ROW_SIZE)
    with on_device_of(x):
        _forward_kernel[(n,)](rows, weight.contiguous(), y, inverse, d, eps, block=block, **compile_options(block))
    return y.view(x.shape), inverse.view(*x.shape[:-1], 1)


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    inverse: torch.Tensor,
    needed: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Returns the gradients of ``x`` [..., d] and of ``weight`` [d], ``None`` where not needed."""
    with_x, with_weight = needed
    rows = _rows(x)
    n, d = rows.shape
    rows_per_group = max(1, triton.cdiv(n, _MAX_ROW_GROUPS)) if with_weight else 1
    num_groups = triton.cdiv(n, rows_per_group)
    # Unneeded outputs are never written: any tensor can be passed.
    grad_x = torch.empty_like(rows) if with_x else rows
    sums = rows.new_empty(num_groups, d, dtype=torch.float32) if with_weight else inverse
    block = block_size(d, MAX_ROW_SIZE)
    with on_device_of(x):
        _backward_kernel[(num_groups,)](
            _rows(grad),
            rows,
            weight.contiguous(),
            inverse,
            grad_x,
            sums,
            n,
            d,
            rows_per_group,
            with_x=with_x,
            with_weight=with_weight,
            block=block,
            **compile_options(block),
        )
    return grad_x.view(x.shape) if with_x else None, sums.sum(0).to(weight.dtype) if with_weight else None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Returns [..., d] as contiguous [n, d]; a view for the engine's inputs."""
    return x.reshape(-1, x.shape[-1]).contiguous()
