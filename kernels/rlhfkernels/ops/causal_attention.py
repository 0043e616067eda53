"""Causal attention over whole sequences (arXiv:1706.03762, section 3.2), from rows of queries, keys and values.

Kept for the backward are those rows and one number a query.

Shapes: b = sequences, t = positions, m = b t, n = numbers of a position, h = query heads, k = key-value heads,
e = head size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from rlhfkernels.ops.forms import takes_native
from rlhfkernels.ops.heads import Heads
from rlhfkernels.ops.native import causal_attention as native


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


def causal_attention_reference(qkv: torch.Tensor, heads: Heads, sight: Sight, reach: Reach) -> torch.Tensor:
    """The plain form: heads expanded, scores, softmax, sum.

    Args:
        qkv: [m, n], rotated.
        heads: where its heads are.
        sight: who sees whom.
        reach: from where on.

    Returns:
        [b (t − start), h e].
    """
    query, key, value = (part.view(sight.b, sight.t, *part.shape[1:]) for part in heads.split(qkv))
    group = heads.num_queries // heads.num_keys
    key, value = key.repeat_interleave(group, 2), value.repeat_interleave(group, 2)
    scores = torch.einsum("bqhe,bphe->bhqp", query, key) * reach.scale
    mask = sight.mask(reach.window)
    weights = torch.softmax(scores.masked_fill(~(sight.causal() if mask is None else mask), float("-inf")), -1)
    return torch.einsum("bhqp,bphe->bqhe", weights, value)[:, reach.start :].flatten(0, 1).flatten(1)


def causal_attention(
    qkv: torch.Tensor, heads: Heads, sight: Sight, reach: Reach, *, kernels: str = "auto"
) -> torch.Tensor:
    """The fast form of ``causal_attention_reference``, with the same gradient; ``kernels`` as in ``takes_native``."""
    # In C a thread takes a key-value head of a sequence: with fewer of them than threads, a library divides it better.
    if takes_native(kernels, qkv) and sight.b * heads.num_keys >= torch.get_num_threads():
        if torch.is_grad_enabled() and qkv.requires_grad:
            attended: torch.Tensor = _CausalAttention.apply(qkv, heads, sight, reach)  # type: ignore[no-untyped-call]
            return attended
        return native.forward(qkv, heads, sight, reach, with_sums=False)[0]
    return _attended(qkv, heads, sight, reach)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, heads: Heads, sight: Sight, reach: Reach) -> torch.Tensor:
        out, sums = native.forward(qkv, heads, sight, reach, with_sums=True)
        ctx.save_for_backward(qkv, sums)
        ctx.heads, ctx.sight, ctx.reach = heads, sight, reach
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        qkv, sums = ctx.saved_tensors
        return native.backward(grads[0], qkv, sums, ctx.heads, ctx.sight, ctx.reach), None, None, None


def _attended(qkv: torch.Tensor, heads: Heads, sight: Sight, reach: Reach) -> torch.Tensor:
    """The library's kernel."""
    b, t, start = sight.b, sight.t, reach.start
    query, key, value = (part.view(b, t, *part.shape[1:]).transpose(1, 2) for part in heads.split(qkv))
    mask = sight.mask(reach.window)
    # A GPU's kernels without a mask are so much better that they may as well attend from every position.
    first = start if mask is not None or _masks_are_cheap(query.device) else 0
    if first:
        query = query[:, :, first:]
        mask = (sight.causal() if mask is None else mask)[:, :, first:]
    attended = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=reach.scale,
        enable_gqa=heads.num_queries != heads.num_keys,
    )
    return attended[:, :, start - first :].transpose(1, 2).reshape(b * (t - start), -1)


def _masks_are_cheap(device: torch.device) -> bool:
    """Whether attention with a mask of its own is about as fast as causal attention."""
    return device.type == "cpu"
