"""The first product of the feed-forward part in a step of decoding: layer after layer, so no weight is in a cache."""

from __future__ import annotations

import itertools
from typing import Any

from rlhfkernels.ops.skinny_linear import skinny_linear, skinny_linear_reference

LARGEST_CACHE_BYTES = 2**28
FORMS = {"op": skinny_linear, "reference": skinny_linear_reference}


def native(tape: Any, x: Any, weight: Any) -> tuple[Any, dict[str, Any]]:
    out = x.new_empty(x.shape[0], weight.shape[0])
    tape.skinny_linear(x, weight, out)
    return out.t(), {}


def test_skinny_linear(timed: Any, draw: Any, size: Any, form: Any) -> None:
    x, first = draw(size.few, size.hidden), draw(2 * size.intermediate, size.hidden)
    copies = 1 + LARGEST_CACHE_BYTES // first.nbytes
    weights = itertools.cycle([first, *(first.clone() for _ in range(copies))])
    timed(lambda: form(x, next(weights)))
