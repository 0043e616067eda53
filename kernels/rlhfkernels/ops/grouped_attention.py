"""Attention of grouped heads on CUDA, which keeps keys and values once a group for the backward.

Flash attention knows groups, but no masks and no float32. The memory-efficient kernel does not know groups: with
``enable_gqa``, torch would take its math kernel, which keeps all scores. Keys and values are repeated for it in the
forward and again in the backward, where autograd would keep the repeated ones.

Shapes: b = sequences, q = queries, t = positions, h = query heads, k = key-value heads, e = head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend

_EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention
_EFFICIENT_BACKWARD = torch.ops.aten._scaled_dot_product_efficient_attention_backward
# Bytes by which the kernel reads a head.
_ALIGNMENT_BYTES = 16


def grouped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Computes ``scaled_dot_product_attention`` with ``enable_gqa``, and its gradients without that of ``bias``.

    Args:
        query: [b, h, q, e].
        key: [b, k, t, e].
        value: [b, k, t, e].
        bias: [b or 1, 1, q, t], added to the scores, in the dtype of ``query``; its rows begin at multiples of 16
            elements. ``None`` is plain causal attention, with q = t.
        scale: multiplies the scores.

    Returns:
        [b, h, q, e].
    """
    if _torch_has_groups(query, key, value, bias, scale):
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, is_causal=bias is None, scale=scale, enable_gqa=True
        )
    if torch.is_grad_enabled() and query.requires_grad and _is_efficient(query):
        out: torch.Tensor = _GroupedAttention.apply(query, key, value, bias, scale)  # type: ignore[no-untyped-call]
        return out
    key, value = (_repeated(part, query) for part in (key, value))
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, is_causal=bias is None, scale=scale
    )


def _is_efficient(query: torch.Tensor) -> bool:
    """Returns whether the memory-efficient kernel takes heads like those of ``query``; it exists on CUDA alone."""
    is_aligned = query.shape[-1] * query.element_size() % _ALIGNMENT_BYTES == 0
    return is_aligned and query.dtype != torch.float64 and (query.is_cuda or isinstance(query, FakeTensor))


def _torch_has_groups(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> bool:
    """Returns whether torch has a kernel that knows groups and keeps no scores; with a mask it is cuDNN's, on Hopper.

    Fake tensors, of a plan or a test, have no device to ask about, and cuDNN's kernel keeps what the other way keeps.
    """
    if isinstance(query, FakeTensor) or not query.is_cuda:
        return bias is None and query.dtype.itemsize < 4
    choice = torch._fused_sdp_choice(query, key, value, bias, 0.0, bias is None, scale=scale, enable_gqa=True)
    return SDPBackend(choice) != SDPBackend.MATH


def _repeated(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Repeats [b, k, t, e] for every query head: [b, h, t, e]."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)


def _summed(grad: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Sums the gradients [b, h, t, e] of repeated heads: [b, k, t, e]."""
    return grad.view(grad.shape[0], num_kv_heads, -1, *grad.shape[2:]).sum(2)


class _GroupedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        bias = None if bias is None else bias.expand(*query.shape[:3], key.shape[2])
        out, *states = _EFFICIENT(
            query, _repeated(key, query), _repeated(value, query), bias, True, 0.0, bias is None, scale=scale
        )
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, bias, out, *states)
        result: torch.Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, bias, out, *states = ctx.saved_tensors
        whole = (query, _repeated(key, query), _repeated(value, query))
        needed = [True, True, True, False]
        grad_query, *repeated, _ = _EFFICIENT_BACKWARD(
            grads[0], *whole, bias, out, *states, 0.0, needed, bias is None, scale=ctx.scale
        )
        return grad_query, *(_summed(grad, key.shape[1]) for grad in repeated), None, None
