"""Log-probabilities under a frozen head, whose gradient the op finds in its forward already."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from rlhfkernels.models.heads import LmHead
from rlhfkernels.ops.logprobs import token_logprobs, token_logprobs_reference


def op(hidden: Any, head: Any, targets: Any, kernels: str = "auto") -> Any:
    return token_logprobs(hidden, head, targets, kernels=kernels)[0]


def reference(hidden: Any, head: Any, targets: Any) -> Any:
    return token_logprobs_reference(hidden, head, targets)[0]


def liger(hidden: Any, head: Any, targets: Any) -> Any:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return -liger_cross_entropy(nn.functional.linear(hidden, head.weight), targets, reduction="none")


FORMS = {"op": op, "reference": reference}
IN_C = functools.partial(op, kernels="native")
LIGER = {"liger": liger}


def test_logprobs(timed: Any, draw: Any, size: Any, form: Any, direction: str) -> None:
    hidden, weight = draw(size.rows, size.hidden), draw(size.vocabulary, size.hidden) * 0.02
    head = LmHead(nn.Parameter(weight, requires_grad=False))
    targets = torch.randint(size.vocabulary, (size.rows,), device=hidden.device)
    timed(lambda: form(hidden, head, targets), [hidden])
