from __future__ import annotations

import functools
from typing import Any

from rlhfkernels.ops.swiglu import swiglu, swiglu_reference

FORMS = {"op": swiglu, "reference": swiglu_reference}
IN_C = functools.partial(swiglu, kernels="native")


def liger(gate_up: Any) -> Any:
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu(*gate_up.chunk(2, dim=-1))


LIGER = {"liger": liger}


def native(tape: Any, gate_up: Any) -> tuple[Any, dict[str, Any]]:
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    tape.activation(gate_up, out, kind="silu", gated=True)
    return out, {}


def test_swiglu(timed: Any, draw: Any, size: Any, form: Any, direction: str) -> None:
    gate_up = draw(size.rows, 2 * size.intermediate)
    timed(lambda: form(gate_up), [gate_up])


def test_swiglu_of_few_rows(timed: Any, draw: Any, size: Any, form: Any) -> None:
    gate_up = draw(size.few, 2 * size.intermediate)
    timed(lambda: form(gate_up))
