"""Transform from the raw outputs of a language-model head to logits.

Shapes: n = positions, d = hidden size, v = vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


def scale_and_cap(raw: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """Returns ``softcap · tanh(scale · raw / softcap)``, or ``scale · raw`` without a cap, in float32 or wider."""
    logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


class LogitTransform(NamedTuple):
    """Transform from raw outputs to logits, and of gradients back.

    Attributes:
        scale: multiplies the raw outputs (Cohere, Granite).
        softcap: bounds the logits (Gemma 2), or ``None``.
        temperature: divides the logits.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns the logits [n, v] of hidden states [n, d], in float32 or wider."""
        logits = scale_and_cap(nn.functional.linear(hidden, weight, bias), self.scale, self.softcap)
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

    def backward_(self, grad: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Turns the gradient of the logits into that of the raw outputs, in place."""
        if self.softcap is not None:
            grad.mul_(1 - (logits * (self.temperature / self.softcap)).square())
        factor = self.scale / self.temperature
        return grad if factor == 1.0 else grad.mul_(factor)
