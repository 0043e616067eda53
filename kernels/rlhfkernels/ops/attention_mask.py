"""Causal attention masks of a batch of sequences, with padding and sliding windows.

Shapes: b = sequences, t = positions.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

_ALIGNMENT = 16


class CausalMask:
    """Masks of a batch, made once per window: a position attends to itself and to earlier positions, not to padding.

    Args:
        tokens: [b, t], of any dtype.
        padding: [b, t] int64, 0 on padding; ``None`` without padding.
    """

    def __init__(self, tokens: torch.Tensor, padding: torch.Tensor | None) -> None:
        self.b, self.t = tokens.shape
        self.padding = padding
        self._device = tokens.device
        self._masks: dict[int | None, torch.Tensor | None] = {}
        self._biases: dict[tuple[int | None, torch.dtype], torch.Tensor | None] = {}

    def mask(self, window: int | None) -> torch.Tensor | None:
        """Returns the mask [b or 1, 1, t, t], true where attended, or ``None`` for plain causal attention."""
        if window not in self._masks:
            self._masks[window] = self._make_mask(window)
        return self._masks[window]

    def bias(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """Returns what is added to the scores, [b or 1, 1, t, t]: 0 where attended, −∞ elsewhere.

        ``None`` for plain causal attention. All layers share it: of ``mask``, torch's attention makes such a copy in
        every call, and keeps it for the backward.
        """
        key = window, dtype
        if key not in self._biases:
            mask = self.mask(window)
            self._biases[key] = None if mask is None else _bias_of(mask, dtype)
        return self._biases[key]

    def _make_mask(self, window: int | None) -> torch.Tensor | None:
        if self.padding is None and (window is None or self.t <= window):
            return None
        mask = self.causal()
        if window is not None:
            mask = mask.triu(1 - window)
        if self.padding is not None:
            # Padding attends to itself: the softmax of an empty row is NaN, which would spread.
            diagonal = torch.eye(self.t, dtype=torch.bool, device=self._device)
            mask = (mask & self.padding.bool()[:, None, None]) | diagonal
        return mask

    def causal(self) -> torch.Tensor:
        """Returns the mask [1, 1, t, t] without windows and padding."""
        return torch.ones(1, 1, self.t, self.t, dtype=torch.bool, device=self._device).tril_()


def _bias_of(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # Torch copies a bias for its memory-efficient attention unless its rows begin at multiples of 8 elements.
    width = -(-mask.shape[-1] // _ALIGNMENT) * _ALIGNMENT
    bias = torch.zeros(*mask.shape[:-1], width, dtype=dtype, device=mask.device)[..., : mask.shape[-1]]
    return bias.masked_fill_(~mask, float("-inf"))


class Segment(NamedTuple):
    """One sequence of a packed row.

    Attributes:
        length: its positions.
        start: the first of them that is a query of the last layer, and whose hidden state is read.
    """

    length: int
    start: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpan:
    """Queries of a layer's attention, and the keys that they see.

    Attributes:
        start: first query position.
        window: positions that a query sees, itself included; ``None`` is all.
        scale: multiplies the scores.
    """

    start: int
    window: int | None
    scale: float
