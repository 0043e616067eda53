"""Sampling in C."""

from __future__ import annotations

import torch

from rlhfkernels.ops.native.launch import check_shape, launch
from rlhfkernels.ops.native.structures import Sample


def draw(logits: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws a token a row from softmax(logits) by inverting its cumulative distribution.

    Args:
        logits: [b, v], overwritten.
        uniform: [b], in [0, 1).

    Returns:
        Tokens [b] int64 and their log-probabilities [b].
    """
    b, v = logits.shape
    check_shape("uniform", uniform, b)
    tokens, logprobs = logits.new_empty(b, dtype=torch.int64), logits.new_empty(b)
    tensors = {"logits": logits, "uniform": uniform, "tokens": tokens, "logprobs": logprobs}
    launch("sample", Sample, b, **tensors, rows=b, size=v)
    return tokens, logprobs
