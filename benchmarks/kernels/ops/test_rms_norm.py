from __future__ import annotations

from typing import Any


def liger(x: Any, weight: Any, eps: float) -> Any:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x, weight, eps, in_place=False)


def record_rms_norm_decode(program: Any, x: Any, weight: Any, eps: float) -> tuple[Any, dict[str, Any]]:
    out = x.new_empty(x.shape)
    program.norm(x, weight, None, out, eps=eps, centered=False)
    return out, {}


def test_rms_norm(timed: Any, draw: Any, size: Any, run_op: Any, direction: str) -> None:
    x, weight = draw(size.rows, size.hidden), draw(size.hidden)
    timed(lambda: run_op(x, weight, 1e-5), [x])


def test_rms_norm_decode(timed: Any, draw: Any, size: Any, run_op: Any) -> None:
    x, weight = draw(size.decode_rows, size.hidden), draw(size.hidden)
    timed(lambda: run_op(x, weight, 1e-5))
