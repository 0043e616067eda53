"""The first product of the feed-forward part in a step of decoding."""

from __future__ import annotations

from typing import Any

from rlhfkernels.ops.skinny_linear import skinny_linear, skinny_linear_reference

FORMS = {"op": skinny_linear, "reference": skinny_linear_reference}


def test_skinny_linear(timed: Any, draw: Any, size: Any, form: Any) -> None:
    x, weight = draw(size.few, size.hidden), draw(2 * size.intermediate, size.hidden)
    timed(lambda: form(x, weight))
