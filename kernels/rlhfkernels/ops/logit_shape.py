"""How a head's raw products become logits.

Shapes: n = positions, d = hidden size, v = vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from rlhfkernels.models.heads import shape_logits


class LogitShape(NamedTuple):
    """How raw products become logits, and gradients of logits gradients of raw products.

    Attributes:
        scale, softcap: as in ``LmHead``.
        temperature: divides the logits.
    """

    scale: float
    softcap: float | None
    temperature: float

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Hidden states [n, d] to logits [n, v], in float32 or wider."""
        logits = shape_logits(nn.functional.linear(hidden, weight, bias), self.scale, self.softcap)
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

    def backward_(self, grad: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Turns the gradient of the logits into that of the raw products, in place."""
        if self.softcap is not None:
            grad.mul_(1 - (logits * (self.temperature / self.softcap)).square())
        factor = self.scale / self.temperature
        return grad if factor == 1.0 else grad.mul_(factor)
