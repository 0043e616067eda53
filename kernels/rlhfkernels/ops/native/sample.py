"""The form in C of ``rlhfkernels.ops.sample.sample``."""

from __future__ import annotations

import torch

from rlhfkernels.ops.native.launch import launch
from rlhfkernels.ops.native.structures import Sample


def draw(logits: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [b] int64 of logits [b, v], which are overwritten, by uniform numbers [b]; and log-probabilities [b]."""
    b, v = logits.shape
    tokens, logprobs = logits.new_empty(b, dtype=torch.int64), logits.new_empty(b)
    given = {"logits": logits, "uniform": uniform, "tokens": tokens, "logprobs": logprobs}
    launch("sample", Sample, b, **given, rows=b, size=v)
    return tokens, logprobs
