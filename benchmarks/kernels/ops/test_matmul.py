"""First matmul of the MLP over full sequences."""

from __future__ import annotations

from typing import Any


def test_matmul(timed: Any, draw: Any, size: Any, run_op: Any) -> None:
    x, weight = draw(size.rows, size.hidden), draw(2 * size.intermediate, size.hidden).t()
    timed(lambda: run_op(x, weight))
