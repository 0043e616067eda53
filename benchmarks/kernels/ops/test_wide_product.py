"""The first product of the feed-forward part over a full length."""

from __future__ import annotations

from typing import Any

from rlhfkernels.ops.wide_product import wide_product, wide_product_reference

FORMS = {"op": wide_product, "reference": wide_product_reference}


def test_wide_product(timed: Any, draw: Any, size: Any, form: Any) -> None:
    x, weight = draw(size.rows, size.hidden), draw(2 * size.intermediate, size.hidden).t()
    timed(lambda: form(x, weight))
