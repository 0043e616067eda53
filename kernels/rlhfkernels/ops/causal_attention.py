"""Causal attention over whole sequences (arXiv:1706.03762, section 3.2), on the output of the QKV projection.

The C backend keeps for the backward its input and one logsumexp a query.

Shapes: b = sequences, t = positions, m = b t, n = outputs of the projection, h = query heads, k = key-value heads,
e = head size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from rlhfkernels.ops.attention_mask import AttentionSpan, CausalMask, Segment
from rlhfkernels.ops.decode_attention import without_plans
from rlhfkernels.ops.dispatch import is_on_cpu, takes_native
from rlhfkernels.ops.grouped_attention import grouped_attention
from rlhfkernels.ops.library_kernels import LibraryKernel
from rlhfkernels.ops.native import causal_attention as native
from rlhfkernels.ops.qkv_layout import QkvLayout

# Inputs that other libraries are measured at: a micro-batch of Llama-7B.
_MEASURED_ROWS, _MEASURED_LEN = 4, 1024
_MEASURED_LAYOUT = QkvLayout(32, 32, 128)
# FlashAttention refuses larger heads.
_MAX_FLASH_HEAD_SIZE = 256


def causal_attention_reference(
    qkv: torch.Tensor, layout: QkvLayout, mask: CausalMask, span: AttentionSpan
) -> torch.Tensor:
    """Computes attention by its formula: scores, softmax, weighted sum, with the key-value heads repeated.

    Args:
        qkv: [m, n], rotated.
        layout: positions of the heads in ``qkv``.
        mask: of the batch.
        span: queries, window and scale.

    Returns:
        [b (t − start), h e].
    """
    query, key, value = (part.view(mask.b, mask.t, *part.shape[1:]) for part in layout.split(qkv))
    group = layout.num_heads // layout.num_kv_heads
    key, value = key.repeat_interleave(group, 2), value.repeat_interleave(group, 2)
    scores = torch.einsum("bqhe,bphe->bhqp", query, key) * span.scale
    attended = mask.mask(span.window)
    weights = torch.softmax(scores.masked_fill(~(mask.causal() if attended is None else attended), float("-inf")), -1)
    return torch.einsum("bhqp,bphe->bqhe", weights, value)[:, span.start :].flatten(0, 1).flatten(1)


def causal_attention(
    qkv: torch.Tensor, layout: QkvLayout, mask: CausalMask, span: AttentionSpan, *, backend: str = "auto"
) -> torch.Tensor:
    """Computes ``causal_attention_reference`` and its gradient; ``backend`` as in ``takes_native``."""
    # A thread of the C takes whole key-value heads: with fewer heads than threads, torch divides the work better.
    if takes_native(backend, qkv) and mask.b * layout.num_kv_heads >= torch.get_num_threads():
        if torch.is_grad_enabled() and qkv.requires_grad:
            out: torch.Tensor = _CausalAttention.apply(qkv, layout, mask, span)  # type: ignore[no-untyped-call]
            return out
        return native.forward(qkv, layout, mask, span, with_logsumexp=False)[0]
    if mask.padding is None and layout.head_size <= _MAX_FLASH_HEAD_SIZE and FLASH.use_for(qkv, backend):
        return _flash(qkv, layout, mask, span)
    return _torch(qkv, layout, mask, span)


def packed_attention(
    qkv: torch.Tensor,
    layout: QkvLayout,
    segments: Sequence[Segment],
    *,
    window: int | None,
    scale: float,
    backend: str = "auto",
) -> torch.Tensor:
    """Computes block-diagonal causal attention: every sequence of a packed row sees itself alone.

    Each sequence is one call, and neighbours of equal lengths share one, so that no score between two sequences is
    computed and no mask of the whole row exists. On CUDA no plan is made for lengths that may not come again.

    Args:
        qkv: [m, n], rotated; m is the sum of the segments' lengths.
        layout: positions of the heads in ``qkv``.
        segments: the sequences in their order.
        window: positions that a query sees, itself included; ``None`` is all.
        scale: multiplies the scores.
        backend: as in ``takes_native``.

    Returns:
        [sum of length − start, h e].
    """
    runs = [(segment, len(list(equal))) for segment, equal in itertools.groupby(segments)]
    parts = qkv.split_with_sizes([segment.length * count for segment, count in runs])
    outs = []
    for (segment, count), part in zip(runs, parts, strict=True):
        mask = CausalMask(part[:, :1].view(count, segment.length), None)
        span = AttentionSpan(start=segment.start, window=window, scale=scale)
        with without_plans(qkv.device):
            outs.append(causal_attention(part, layout, mask, span, backend=backend))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, layout: QkvLayout, mask: CausalMask, span: AttentionSpan) -> torch.Tensor:
        out, logsumexp = native.forward(qkv, layout, mask, span, with_logsumexp=True)
        ctx.save_for_backward(qkv, logsumexp)
        ctx.arguments = layout, mask, span
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        qkv, logsumexp = ctx.saved_tensors
        return native.backward(grads[0], qkv, logsumexp, *ctx.arguments), None, None, None


def _torch(qkv: torch.Tensor, layout: QkvLayout, mask: CausalMask, span: AttentionSpan) -> torch.Tensor:
    b, t, start = mask.b, mask.t, span.start
    query, key, value = (part.view(b, t, *part.shape[1:]).transpose(1, 2) for part in layout.split(qkv))
    attended = mask.bias(span.window, query.dtype)
    # On CUDA the kernels for plain causal attention are so much faster that all positions may attend.
    first = start if attended is not None or _masks_are_cheap(query) else 0
    if first:
        query = query[:, :, first:]
        attended = (mask.causal() if attended is None else attended)[:, :, first:]
    grouped = layout.num_heads != layout.num_kv_heads
    if grouped and not _masks_are_cheap(query):
        out = grouped_attention(query, key, value, attended, span.scale)
    else:
        out = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attended,
            is_causal=attended is None,
            scale=span.scale,
            enable_gqa=grouped,
        )
    return out[:, :, start - first :].transpose(1, 2).reshape(b * (t - start), -1)


def _flash(qkv: torch.Tensor, layout: QkvLayout, mask: CausalMask, span: AttentionSpan) -> torch.Tensor:
    """Computes attention by FlashAttention, without masks: it aligns the last query with the last key."""
    from flash_attn import flash_attn_func

    b, t = mask.b, mask.t
    query, key, value = (part.view(b, t, *part.shape[1:]) for part in layout.split(qkv))
    before = -1 if span.window is None else span.window - 1
    out: torch.Tensor = flash_attn_func(
        query[:, span.start :], key, value, softmax_scale=span.scale, causal=True, window_size=(before, 0)
    )
    return out.reshape(b * (t - span.start), -1)


def _measured(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    shape = (_MEASURED_ROWS * _MEASURED_LEN, _MEASURED_LAYOUT.width)
    return (torch.randn(*shape, generator=generator, device=device).to(dtype),)


def _at_measured(function: Callable[..., torch.Tensor], tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Computes attention of the measured sizes by ``function``."""
    mask = CausalMask(tensors[0][:, :1].view(_MEASURED_ROWS, _MEASURED_LEN), None)
    span = AttentionSpan(start=0, window=None, scale=_MEASURED_LAYOUT.head_size**-0.5)
    return function(tensors[0], _MEASURED_LAYOUT, mask, span)


FLASH = LibraryKernel(
    op="causal_attention",
    package="flash_attn",
    ours=functools.partial(_at_measured, _torch),
    theirs=functools.partial(_at_measured, _flash),
    inputs=_measured,
)


def _masks_are_cheap(query: torch.Tensor) -> bool:
    """Returns whether attention with an explicit mask is about as fast as plain causal attention."""
    return is_on_cpu(query)
