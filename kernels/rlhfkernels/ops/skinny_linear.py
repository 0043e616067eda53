"""A product of a few rows with a large weight, as every step of decoding asks for: bound by reading the weight once.

On a processor the plain ``x Wᵀ`` of two to eight rows runs several times below the memory's bandwidth, and a single row
no better; ``W xᵀ`` with the rows untouched in memory runs at it. So the result is handed out transposed.

Shapes: b = rows, i = inputs, o = outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from rlhfkernels.ops.forms import takes_native
from rlhfkernels.ops.lora_linear import LinearGroup
from rlhfkernels.ops.native.tape import tape_for

# Above it the weights are not what is waited for, and a library's products are better than those in C.
MOST_NATIVE_ROWS = 64


def skinny_linear_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The plain form: ``(x Wᵀ)ᵀ``.

    Args:
        x: [b, i].
        weight: [o, i].

    Returns:
        [o, b].
    """
    return nn.functional.linear(x, weight).t()


def skinny_linear(x: torch.Tensor, weight: torch.Tensor, *, kernels: str = "auto") -> torch.Tensor:
    """The form for few rows; arguments and result as ``skinny_linear_reference``, no gradient.

    ``kernels`` as in ``takes_native``; the form in C is ``Tape.skinny_linear``.
    """
    few = x.shape[0] <= MOST_NATIVE_ROWS
    if few and takes_native(kernels, x, weight) and weight.is_contiguous():
        y = x.new_empty(x.shape[0], weight.shape[0])
        tape = tape_for(x)
        if tape is not None:
            tape.skinny_linear(x.contiguous(), weight, y)
            tape.run()
        return y.t()
    if not x.is_cpu:
        return skinny_linear_reference(x, weight)
    if x.shape[0] == 1:
        # One row goes through a matrix-vector product that is slower than a matrix product of two.
        return torch.mm(weight, x.expand(2, -1).contiguous().t())[:, :1]
    return torch.mm(weight, x.t())


class SkinnyLoraLinear:
    """``lora_linear`` for a few rows at a time, again and again: every view is made once, and results reuse memory.

    Args:
        group: the layers.
        rows: b of every call.
        buffers: results by their number of outputs, shared with other layers: a result is read before the next call.
    """

    def __init__(self, group: LinearGroup, rows: int, buffers: dict[int, torch.Tensor]) -> None:
        self._weight = group.weight
        n = group.weight.shape[0]
        self._twice = rows == 1 and group.weight.is_cpu
        if n not in buffers:
            buffers[n] = group.weight.new_empty(n, 2 if self._twice else rows)
        self._whole = buffers[n]
        self._out = self._whole[:, :rows]
        self._bias = None if group.bias is None else group.bias[:, None]
        self._add_low_rank: Callable[[torch.Tensor], None] | None = None
        if group.down is not None:
            adapter = _adapter_of(group, rows, self._out)
            self._add_low_rank = adapter

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[b, k] to [n, b], without a graph; the next call that shares the result's memory overwrites it."""
        # One row goes through a matrix-vector product that is slower than a matrix product of two.
        torch.mm(self._weight, (x.expand(2, -1).contiguous() if self._twice else x).t(), out=self._whole)
        if self._bias is not None:
            self._out.add_(self._bias)
        if self._add_low_rank is not None:
            self._add_low_rank(x)
        return self._out


def _adapter_of(group: LinearGroup, rows: int, out: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """What adds Σ scaling · B A xᵀ to ``out``: one batch of products where the layers are alike, else one a layer."""
    assert group.down is not None
    down_t = group.down.t()
    first, count = group.parts[0], len(group.parts)
    n, r = first.up.shape
    if group.down.dtype != group.weight.dtype:
        return lambda x: _add_wide(group, x, out)
    low = group.down.new_empty(rows, down_t.shape[1])
    alike = all(part.up.shape == (n, r) and part.scaling == first.scaling for part in group.parts)
    if alike and group.up is not None and count * n == out.shape[0]:
        ups = group.up.view(count, n, r)
        lows = low.view(rows, count, r).permute(1, 2, 0)
        target = torch.unflatten(out, 0, (count, n))

        def add_batch(x: torch.Tensor) -> None:
            torch.mm(x, down_t, out=low)
            target.baddbmm_(ups, lows, alpha=first.scaling)

        return add_batch
    ranks = torch.split(low, [part.down.shape[0] for part in group.parts], dim=1)
    pieces = [
        (out[part.columns].t(), piece, part.up.detach().t(), part.scaling)
        for part, piece in zip(group.parts, ranks, strict=True)
    ]

    def add_each(x: torch.Tensor) -> None:
        torch.mm(x, down_t, out=low)
        for columns, piece, up_t, scaling in pieces:
            columns.addmm_(piece, up_t, alpha=scaling)

    return add_each


def _add_wide(group: LinearGroup, x: torch.Tensor, out: torch.Tensor) -> None:
    """Adapters in another dtype than the base work in their own."""
    assert group.down is not None
    low = x.to(group.down.dtype) @ group.down.t()
    pieces = torch.split(low, [part.down.shape[0] for part in group.parts], dim=1)
    for part, piece in zip(group.parts, pieces, strict=True):
        out[part.columns] += (piece @ part.up.t()).mul_(part.scaling).t()
