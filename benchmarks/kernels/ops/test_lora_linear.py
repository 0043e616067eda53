"""The query, key and value projections with their adapters; the base is frozen, the adapters are trained."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from rlhfkernels.ops.lora_linear import LinearGroup, LoraPart, lora_linear, lora_linear_reference

FORMS = {"op": lora_linear, "reference": lora_linear_reference}
IN_C = functools.partial(lora_linear, kernels="native")


def group_of(draw: Any, size: Any) -> LinearGroup:
    outputs = list(size.qkv)
    weight, down, up = draw(sum(outputs), size.hidden), draw(3 * size.rank, size.hidden), draw(sum(outputs), size.rank)
    starts = [sum(outputs[:i]) for i in range(3)]
    pieces = zip(down.split(size.rank), up.split(outputs), starts, strict=True)
    return LinearGroup(
        weight=weight,
        bias=None,
        weights=tuple(nn.Parameter(w, requires_grad=False) for w in weight.split(outputs)),
        biases=(),
        transposed=False,
        down=down,
        up=up,
        parts=tuple(LoraPart(down=nn.Parameter(a), up=nn.Parameter(b), start=s, scaling=1.0) for a, b, s in pieces),
    )


def test_lora_linear(timed: Any, draw: Any, size: Any, form: Any, direction: str) -> None:
    x, group = draw(size.rows, size.hidden), group_of(draw, size)
    timed(lambda: form(x, group), [x, *(p for p in group.parameters() if p.requires_grad)])
