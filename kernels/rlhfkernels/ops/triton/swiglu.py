"""SwiGLU, silu(gate) · up, in one pass over memory, and both gradients in another.

Shapes: m = rows, i = intermediate size.
"""

import torch
import triton
import triton.language as tl

from rlhfkernels.ops.triton.launch import block_size, compile_options, on_device_of

_MAX_BLOCK = 1024


@triton.jit
def _forward_kernel(gate_up_ptr, y_ptr, size, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < size
    gates = gate_up_ptr + row * 2 * size + columns
    gate = tl.load(gates, mask=inside, other=0.0)
    up = tl.load(gates + size, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    tl.store(y_ptr + row * size + columns, (wide * tl.sigmoid(wide) * up).to(gate.dtype), mask=inside)


@triton.jit
def _backward_kernel(grad_ptr, gate_up_ptr, grad_gate_up_ptr, size, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < size
    place = row * 2 * size + columns
    gate = tl.load(gate_up_ptr + place, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + place + size, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * size + columns, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    sigmoid = tl.sigmoid(wide)
    grad_gate = grad * up * sigmoid * (1.0 + wide * (1.0 - sigmoid))
    tl.store(grad_gate_up_ptr + place, grad_gate.to(gate.dtype), mask=inside)
    tl.store(grad_gate_up_ptr + place + size, (grad * wide * sigmoid).to(gate.dtype), mask=inside)


def forward(gate_up: torch.Tensor) -> torch.Tensor:
    """Returns silu(gate) · up, [..., i], of [..., 2 i]."""
    size = gate_up.shape[-1] // 2
    gate_up = gate_up.contiguous()
    y = gate_up.new_empty(*gate_up.shape[:-1], size)
    block, grid = _grid(y)
    with on_device_of(gate_up):
        _forward_kernel[grid](gate_up, y, size, block=block, **compile_options(block))
    return y


def backward(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of ``gate_up``, [..., 2 i]."""
    gate_up = gate_up.contiguous()
    grad_gate_up = torch.empty_like(gate_up)
    block, grid = _grid(grad)
    size, options = grad.shape[-1], compile_options(block)
    with on_device_of(gate_up):
        _backward_kernel[grid](grad.contiguous(), gate_up, grad_gate_up, size, block=block, **options)
    return grad_gate_up


def _grid(y: torch.Tensor) -> tuple[int, tuple[int, int]]:
    """Returns the columns of a program, and the grid over the rows and columns of ``y``."""
    size = y.shape[-1]
    block = block_size(size, _MAX_BLOCK)
    return block, (y.numel() // size, triton.cdiv(size, block))
