"""The norm of gradients that are clipped together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# As in torch's clipping: added to the norm that divides.
NORM_EPS = 1e-6


def total_norm(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the norm of all gradients, a scalar in float32 or wider.

    In bfloat16 it would have 3 digits, and clipping multiplies every gradient by it.
    """
    norms: list[torch.Tensor] = []
    for dtype in dict.fromkeys(grad.dtype for grad in grads):  # torch's fused norm takes one
        alike = [grad for grad in grads if grad.dtype == dtype]
        norms += torch._foreach_norm(alike, 2.0, torch.promote_types(dtype, torch.float32))
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm
