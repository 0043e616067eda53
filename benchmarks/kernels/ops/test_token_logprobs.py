"""Log-probabilities under a frozen head, whose gradient the forward computes already."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rlhfkernels.ops.logit_transform import LogitTransform


def adapt(function: Any) -> Any:
    return lambda *arguments: function(*arguments, LogitTransform())[0]


def liger(hidden: Any, weight: Any, bias: Any, targets: Any) -> Any:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return -liger_cross_entropy(nn.functional.linear(hidden, weight, bias), targets, reduction="none")


def test_token_logprobs(timed: Any, draw: Any, size: Any, run_op: Any, direction: str) -> None:
    hidden, weight = draw(size.rows, size.hidden), draw(size.vocabulary, size.hidden) * 0.02
    targets = torch.randint(size.vocabulary, (size.rows,), device=hidden.device)
    timed(lambda: run_op(hidden, weight, None, targets), [hidden])
