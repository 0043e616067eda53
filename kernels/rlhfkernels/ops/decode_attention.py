"""Attention of one new query a row over the KV cache. The query heads of a group read their keys and values once.

The C backend is ``Program.decode_attention``, which also rotates and writes the cache.

Shapes: b = batch, h = query heads, k = key-value heads, g = h / k, n = cached positions, e = head size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlhfkernels.ops.dispatch import is_on_cpu


def decode_attention_reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes attention by its formula: scores, softmax, weighted sum, with the key-value heads repeated.

    Args:
        query: [b, h, e]; head j reads key-value head j // g.
        keys: [b, k, n, e].
        values: [b, k, n, e].
        scale: multiplies the scores.
        mask: [b or 1, n], bool, true on attended positions; or in the dtype of ``query``, added to the scores; ``None``
            attends to all.

    Returns:
        [b, h, e].
    """
    g = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(g, 1), values.repeat_interleave(g, 1)
    scores = torch.einsum("bhe,bhne->bhn", query, keys) * scale
    if mask is not None:
        added = mask if mask.is_floating_point() else torch.where(mask, 0.0, float("-inf")).to(scores)
        scores = scores + added[:, None]
    return torch.einsum("bhn,bhne->bhe", torch.softmax(scores, -1), values)


def decode_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes ``decode_attention_reference``, without a gradient."""
    b, h, e = query.shape
    k = keys.shape[1]
    if not is_on_cpu(query):
        return _packed(query, keys, values, scale, mask)
    # bmm would round the scores to bfloat16; scaled_dot_product_attention keeps them in float32.
    if query.dtype.itemsize < 4:
        attended = nn.functional.scaled_dot_product_attention(
            query[:, :, None],
            keys,
            values,
            attn_mask=None if mask is None else mask[:, None, None],
            scale=scale,
            enable_gqa=h != k,
        )
        return attended.squeeze(2)
    # On the CPU, scaled_dot_product_attention of one query costs more than two bmm.
    g, n = h // k, keys.shape[2]
    scores = torch.bmm((query * scale).view(b * k, g, e), keys.flatten(0, 1).transpose(1, 2))
    if mask is not None and mask.dtype == torch.bool:
        scores.view(b, h, n).masked_fill_(~mask[:, None], float("-inf"))
    elif mask is not None:
        scores.view(b, h, n).add_(mask[:, None])
    return torch.bmm(torch.softmax(scores, -1), values.flatten(0, 1)).view(b, h, e)


def _packed(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """Computes attention with the queries of a group as rows of one key-value head.

    With ``enable_gqa`` and a mask, torch has only the math kernel on CUDA. As rows, any kernel runs, and keys and
    values are not repeated.
    """
    b, h, e = query.shape
    k, n = keys.shape[1], keys.shape[2]
    rows = query.reshape(b, k, h // k, e)
    attended = None if mask is None else mask[:, None, None].expand(b, k, h // k, n)
    out = nn.functional.scaled_dot_product_attention(rows, keys, values, attn_mask=attended, scale=scale)
    return out.reshape(b, h, e)


def without_plans(device: torch.device) -> AbstractContextManager[None]:
    """Leaves attention on CUDA to kernels that need no plan.

    cuDNN makes one for every shape, which every decode step changes, and every sequence of a packed row.
    """
    if device.type == "cpu":
        return nullcontext()
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    kept: AbstractContextManager[None] = sdpa_kernel(backends)
    return kept
