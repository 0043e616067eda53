"""The heads that read a trunk's hidden states: next-token logits, and one scalar a position.

Shapes: b = batch, t = positions, n = positions of a whole batch, d = hidden size, v = vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn

from rlhfkernels.ops.logit_transform import LogitTransform, scale_and_cap
from rlhfkernels.ops.skinny_linear import skinny_linear


class LmHead(nn.Module):
    """The language-model head: ``softcap · tanh(scale · (h Wᵀ + bias) / softcap)``, or ``scale · (h Wᵀ + bias)``.

    Args:
        weight: [v, d]; the very parameter of the model, so a tied head stays tied.
        bias: [v] or ``None``.
        scale: multiplies the logits (Cohere, Granite); 1 for most models.
        softcap: bounds the logits (Gemma 2); ``None`` for most models.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.scale = scale
        self.softcap = softcap

    def transform(self, temperature: float = 1.0) -> LogitTransform:
        """Returns the transform from ``h Wᵀ + bias`` to logits divided by ``temperature``."""
        return LogitTransform(self.scale, self.softcap, temperature)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Computes the logits [..., v] of hidden states [..., d], in float32 or wider."""
        return scale_and_cap(nn.functional.linear(hidden, self.weight, self.bias), self.scale, self.softcap)

    @torch.no_grad()
    def decode_logits(self, hidden: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
        """Computes the logits [b, v] of a decode step, without a graph; see ``skinny_linear``."""
        logits = skinny_linear(hidden, self.weight, backend=backend).t().contiguous()
        if self.bias is not None:
            logits += self.bias
        return scale_and_cap(logits, self.scale, self.softcap)


class ScalarHead(nn.Module):
    """One number a position, ``h · w``: the reward or the value.

    Args:
        hidden_size: d.
        device: where the weight lives.
        dtype: dtype of the weight. The computation and the result are in float32 or wider.
    """

    def __init__(self, hidden_size: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        # 1/sqrt(d + 1), as reward models are commonly initialised: scores of order 1 on normalised hidden states.
        weight = torch.empty(1, hidden_size, device=device, dtype=dtype)
        self.weight = nn.Parameter(nn.init.normal_(weight, std=(hidden_size + 1) ** -0.5))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., d] to scalars [...], in float32 or wider."""
        # The sum over d in bfloat16 would round values to 3 digits, and advantages are differences of values.
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return nn.functional.linear(hidden.to(dtype), self.weight.to(dtype)).squeeze(-1)
