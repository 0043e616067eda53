"""Sampling of one token a row, as at the end of every decode step."""

from __future__ import annotations

from typing import Any

import torch


def test_sample(timed: Any, draw: Any, size: Any, run_op: Any) -> None:
    logits = draw(size.decode_rows, size.vocabulary).float()
    generator = torch.Generator(logits.device).manual_seed(0)
    timed(lambda: run_op(logits.clone(), generator))
