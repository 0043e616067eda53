from __future__ import annotations

from typing import Any


def liger(gate_up: Any) -> Any:
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu(*gate_up.chunk(2, dim=-1))


def record_swiglu_decode(program: Any, gate_up: Any) -> tuple[Any, dict[str, Any]]:
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    program.activation(gate_up, out, kind="silu", gated=True)
    return out, {}


def test_swiglu(timed: Any, draw: Any, size: Any, run_op: Any, direction: str) -> None:
    gate_up = draw(size.rows, 2 * size.intermediate)
    timed(lambda: run_op(gate_up), [gate_up])


def test_swiglu_decode(timed: Any, draw: Any, size: Any, run_op: Any) -> None:
    gate_up = draw(size.decode_rows, 2 * size.intermediate)
    timed(lambda: run_op(gate_up))
