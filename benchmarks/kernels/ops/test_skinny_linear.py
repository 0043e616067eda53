"""First matmul of the MLP in a decode step, layer after layer, so that no weight is in a cache."""

from __future__ import annotations

import itertools
from typing import Any

MAX_CACHE_BYTES = 2**28


def record_skinny_linear(program: Any, x: Any, weight: Any) -> tuple[Any, dict[str, Any]]:
    out = x.new_empty(x.shape[0], weight.shape[0])
    program.skinny_linear(x, weight, out)
    return out.t(), {}


def test_skinny_linear(timed: Any, draw: Any, size: Any, run_op: Any) -> None:
    x, first = draw(size.decode_rows, size.hidden), draw(2 * size.intermediate, size.hidden)
    num_copies = 1 + MAX_CACHE_BYTES // first.nbytes
    weights = itertools.cycle([first, *(first.clone() for _ in range(num_copies))])
    timed(lambda: run_op(x, next(weights)))
