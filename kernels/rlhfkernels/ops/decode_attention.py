"""Attention of one new query a row over the keys and values so far, each group of heads reading its own once.

Shapes: b = batch, h = query heads, k = key-value heads, g = h / k, n = positions so far, e = head size.
"""

from __future__ import annotations

import torch
from torch import nn


def decode_attention_reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The plain form: heads expanded, scores, softmax, sum.

    Args:
        query: [b, h, e]; head j reads key-value head j // g.
        keys: [b, k, n, e].
        values: [b, k, n, e].
        scale: multiplies the scores.
        mask: [b, n] bool, true on positions that are seen; ``None`` is all.

    Returns:
        [b, h, e].
    """
    g = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(g, 1), values.repeat_interleave(g, 1)
    scores = torch.einsum("bhe,bhne->bhn", query, keys) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    return torch.einsum("bhn,bhne->bhe", torch.softmax(scores, -1), values)


def decode_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The fast form; arguments and result as ``decode_attention_reference``, no gradient."""
    b, h, e = query.shape
    k = keys.shape[1]
    # The products below would round scores to the inputs' precision, the library's kernel keeps them in float32.
    if not query.is_cpu or query.dtype.itemsize < 4:
        attended = nn.functional.scaled_dot_product_attention(
            query[:, :, None],
            keys,
            values,
            attn_mask=None if mask is None else mask[:, None, None],
            scale=scale,
            enable_gqa=h != k,
        )
        return attended.squeeze(2)
    # On a processor the library's kernel for one query costs more than these products.
    g, n = h // k, keys.shape[2]
    scores = torch.bmm((query * scale).view(b * k, g, e), _rows(keys).transpose(1, 2))
    if mask is not None:
        scores.view(b, h, n).masked_fill_(~mask[:, None], float("-inf"))
    return torch.bmm(torch.softmax(scores, -1), _rows(values)).view(b, h, e)


def _rows(states: torch.Tensor) -> torch.Tensor:
    """[b, k, n, e] to [b k, n, e]: a view of a cache's states."""
    return states.flatten(0, 1)
