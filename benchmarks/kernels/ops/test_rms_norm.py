from __future__ import annotations

import functools
from typing import Any

from rlhfkernels.ops.rms_norm import rms_norm, rms_norm_reference

FORMS = {"op": rms_norm, "reference": rms_norm_reference}
IN_C = functools.partial(rms_norm, kernels="native")


def liger(x: Any, weight: Any, eps: float) -> Any:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x, weight, eps, in_place=False)


LIGER = {"liger": liger}


def native(tape: Any, x: Any, weight: Any, eps: float) -> tuple[Any, dict[str, Any]]:
    out = x.new_empty(x.shape)
    tape.norm(x, weight, None, out, eps=eps, centred=False)
    return out, {}


def test_rms_norm(timed: Any, draw: Any, size: Any, form: Any, direction: str) -> None:
    x, weight = draw(size.rows, size.hidden), draw(size.hidden)
    timed(lambda: form(x, weight, 1e-5), [x])


def test_rms_norm_of_few_rows(timed: Any, draw: Any, size: Any, form: Any) -> None:
    x, weight = draw(size.few, size.hidden), draw(size.hidden)
    timed(lambda: form(x, weight, 1e-5))
