"""Causal attention over whole sequences (arXiv:1706.03762, section 3.2), from rows of queries, keys and values.

Kept for the backward are those rows and one number a query.

Shapes: b = sequences, t = positions, m = b t, n = numbers of a position, h = query heads, k = key-value heads,
e = head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rlhfkernels.ops.forms import takes_native
from rlhfkernels.ops.heads import Heads
from rlhfkernels.ops.native import causal_attention as native
from rlhfkernels.ops.sight import Reach, Sight


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
