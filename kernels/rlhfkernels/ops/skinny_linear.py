"""Linear layer of a few rows, as every decode step needs: bound by reading the weight once.

On the CPU, torch's ``x Wᵀ`` of one to eight rows runs several times below the memory bandwidth; ``W xᵀ`` reaches it. So
the result is transposed.

Shapes: b = rows, i = inputs, o = outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from rlhfkernels.ops.dispatch import takes_native
from rlhfkernels.ops.lora_linear import LinearGroup
from rlhfkernels.ops.native.program import make_program

# With more rows, computing costs more than reading the weight, and torch's matmul is faster than the C.
MAX_NATIVE_ROWS = 64


def skinny_linear_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Computes ``(x Wᵀ)ᵀ``.

    Args:
        x: [b, i].
        weight: [o, i].

    Returns:
        [o, b].
    """
    return nn.functional.linear(x, weight).t()


def skinny_linear(x: torch.Tensor, weight: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Computes ``skinny_linear_reference``, without a gradient; ``backend`` as in ``takes_native``."""
    if x.shape[0] <= MAX_NATIVE_ROWS and takes_native(backend, x, weight) and weight.is_contiguous():
        y = x.new_empty(x.shape[0], weight.shape[0])
        program = make_program(x)
        if program is not None:
            program.skinny_linear(x.contiguous(), weight, y)
            program.run()
        return y.t()
    if not x.is_cpu:
        return skinny_linear_reference(x, weight)
    if x.shape[0] == 1:
        # torch takes gemv for one row, which is slower than gemm of two.
        return torch.mm(weight, x.expand(2, -1).contiguous().t())[:, :1]
    return torch.mm(weight, x.t())


class SkinnyLoraLinear:
    """``lora_linear`` for the rows of decode steps on a CPU. Views are made once, and results share buffers.

    Args:
        group: the layers.
        rows: b of every call.
        buffers: results by number of outputs, shared with other layers: a result is read before the next call.
    """

    def __init__(self, group: LinearGroup, rows: int, buffers: dict[int, torch.Tensor]) -> None:
        self._weight = group.weight
        n = group.weight.shape[0]
        # torch takes gemv for one row, which is slower than gemm of two.
        self._doubles_row = rows == 1
        if n not in buffers:
            buffers[n] = group.weight.new_empty(n, 2 if self._doubles_row else rows)
        self._buffer = buffers[n]
        self.out = self._buffer[:, :rows]
        self._bias = None if group.bias is None else group.bias[:, None]
        self._add_low_rank = None if group.down is None else _low_rank_adder(group, rows, self.out)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Computes [n, b] of [b, k], without a graph, in a buffer that later calls overwrite."""
        torch.mm(self._weight, (x.expand(2, -1).contiguous() if self._doubles_row else x).t(), out=self._buffer)
        if self._bias is not None:
            self.out.add_(self._bias)
        if self._add_low_rank is not None:
            self._add_low_rank(x)
        return self.out


def _low_rank_adder(group: LinearGroup, rows: int, out: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Returns a function that adds Σ scaling · B A xᵀ to ``out``, by one bmm if the layers have equal sizes."""
    assert group.down is not None
    down_t = group.down.t()
    first, count = group.parts[0], len(group.parts)
    n, r = first.up.shape
    if group.down.dtype != group.weight.dtype:
        return lambda x: _add_wide(group, x, out)
    low = group.down.new_empty(rows, down_t.shape[1])
    are_equal = all(part.up.shape == (n, r) and part.scaling == first.scaling for part in group.parts)
    if are_equal and group.up is not None and count * n == out.shape[0]:
        ups = group.up.view(count, n, r)
        lows = low.view(rows, count, r).permute(1, 2, 0)
        outs = torch.unflatten(out, 0, (count, n))

        def add_batch(x: torch.Tensor) -> None:
            torch.mm(x, down_t, out=low)
            outs.baddbmm_(ups, lows, alpha=first.scaling)

        return add_batch
    ranks = torch.split(low, [part.down.shape[0] for part in group.parts], dim=1)
    terms = [
        (out[part.columns].t(), columns, part.up.detach().t(), part.scaling)
        for part, columns in zip(group.parts, ranks, strict=True)
    ]

    def add_each(x: torch.Tensor) -> None:
        torch.mm(x, down_t, out=low)
        for columns, low_columns, up_t, scaling in terms:
            columns.addmm_(low_columns, up_t, alpha=scaling)

    return add_each


def _add_wide(group: LinearGroup, x: torch.Tensor, out: torch.Tensor) -> None:
    """Adds adapters whose dtype differs from the base's, computed in their own dtype."""
    assert group.down is not None
    low = x.to(group.down.dtype) @ group.down.t()
    ranks = torch.split(low, [part.down.shape[0] for part in group.parts], dim=1)
    for part, columns in zip(group.parts, ranks, strict=True):
        out[part.columns] += (columns @ part.up.t()).mul_(part.scaling).t()
