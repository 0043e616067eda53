"""The first product of the feed-forward part over a full length."""

from __future__ import annotations

import functools
from typing import Any

from rlhfkernels.ops.product import product, product_reference

FORMS = {"op": product, "reference": product_reference}
IN_C = functools.partial(product, kernels="native")


def test_product(timed: Any, draw: Any, size: Any, form: Any) -> None:
    x, weight = draw(size.rows, size.hidden), draw(2 * size.intermediate, size.hidden).t()
    timed(lambda: form(x, weight))
