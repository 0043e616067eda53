"""Who sees whom in a batch of sequences.

Shapes: b = sequences, t = positions.
"""

from __future__ import annotations

import dataclasses

import torch


class Sight:
    """Who sees whom in a batch: a position those before it and itself, less padding.

    Args:
        tokens: [b, t], of any dtype.
        padding: [b, t] int64, 0 on padding; ``None`` where nothing is padded.
    """

    def __init__(self, tokens: torch.Tensor, padding: torch.Tensor | None) -> None:
        self.b, self.t = tokens.shape
        self.padding = padding
        self._device = tokens.device
        self._masks: dict[int | None, torch.Tensor | None] = {}

    def mask(self, window: int | None) -> torch.Tensor | None:
        """Who sees whom, [b or 1, 1, t, t] bool; ``None`` where it is everyone at those before."""
        if window not in self._masks:
            self._masks[window] = self._make_mask(window)
        return self._masks[window]

    def _make_mask(self, window: int | None) -> torch.Tensor | None:
        if self.padding is None and (window is None or self.t <= window):
            return None
        mask = self.causal()
        if window is not None:
            mask = mask.triu(1 - window)
        if self.padding is not None:
            # Padding sees itself, so that no row is empty: a softmax over nothing is no number, and that would spread.
            itself = torch.eye(self.t, dtype=torch.bool, device=self._device)
            mask = (mask & self.padding.bool()[:, None, None]) | itself
        return mask

    def causal(self) -> torch.Tensor:
        """[1, 1, t, t], without windows and padding."""
        return torch.ones(1, 1, self.t, self.t, dtype=torch.bool, device=self._device).tril_()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """What of a batch attends, and how.

    Attributes:
        start: the first position that attends.
        window: how many positions one sees, itself included; ``None`` is all.
        scale: multiplies the scores.
    """

    start: int
    window: int | None
    scale: float
