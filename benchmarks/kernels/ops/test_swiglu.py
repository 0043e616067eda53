from __future__ import annotations

from typing import Any

from rlhfkernels.ops.swiglu import swiglu, swiglu_reference

FORMS = {"op": swiglu, "reference": swiglu_reference}


def liger(gate_up: Any) -> Any:
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu(*gate_up.chunk(2, dim=-1))


LIGER = {"liger": liger}


def test_swiglu(timed: Any, draw: Any, size: Any, form: Any, direction: str) -> None:
    gate_up = draw(size.rows, 2 * size.intermediate)
    timed(lambda: form(gate_up), [gate_up])
