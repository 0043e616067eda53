"""Query, key and value projections with trained adapters on a frozen base."""

from __future__ import annotations

from typing import Any

from torch import nn

from rlhfkernels.ops.lora_linear import LinearGroup, LoraPart


def make_group(draw: Any, size: Any) -> LinearGroup:
    outputs = list(size.qkv)
    weight, down, up = draw(sum(outputs), size.hidden), draw(3 * size.rank, size.hidden), draw(sum(outputs), size.rank)
    starts = [sum(outputs[:i]) for i in range(3)]
    parts = zip(down.split(size.rank), up.split(outputs), starts, strict=True)
    return LinearGroup(
        weight=weight,
        bias=None,
        weights=tuple(nn.Parameter(w, requires_grad=False) for w in weight.split(outputs)),
        biases=(),
        transposed=False,
        down=down,
        up=up,
        parts=tuple(LoraPart(down=nn.Parameter(a), up=nn.Parameter(b), start=s, scaling=1.0) for a, b, s in parts),
    )


def test_lora_linear(timed: Any, draw: Any, size: Any, run_op: Any, direction: str) -> None:
    x, group = draw(size.rows, size.hidden), make_group(draw, size)
    timed(lambda: run_op(x, group), [x, *(p for p in group.parameters() if p.requires_grad)])
