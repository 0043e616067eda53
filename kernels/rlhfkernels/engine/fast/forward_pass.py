"""Fast forward passes over whole sequences: one loop over the blocks, for prompts, for scoring and for training.

A layer keeps for its backward the inputs of its matmuls, norms and attention, and nothing else. The caller names the
adapter set: no module is switched.

Shapes: b = batch, t = positions, m = b t, d = hidden size, k = key-value heads, e = head size, s = rotated elements of
a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlhfkernels.engine.fast.blocks import Block, Blocks
from rlhfkernels.engine.trunk import positions
from rlhfkernels.ops.attention_mask import AttentionSpan, CausalMask
from rlhfkernels.ops.causal_attention import causal_attention
from rlhfkernels.ops.rotary import rotary_
from rlhfkernels.ops.swiglu import swiglu

# Receives a layer's index, its keys and its values, [b, k, t, e] each.
StoreKv = Callable[[int, torch.Tensor, torch.Tensor], object]


class _Context(NamedTuple):
    """Inputs that all layers of a forward pass share.

    Attributes:
        mask: attention mask of the batch.
        scale: of the attention scores.
        adapter: the adapter set.
        backend: see ``Blocks``.
        rotary: cosines and signed sines, [1 or b, t, s] each.
    """

    mask: CausalMask
    scale: float
    adapter: str | None
    backend: str
    rotary: tuple[torch.Tensor, torch.Tensor] | None


def run_blocks(
    blocks: Blocks,
    adapter: str | None,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    start: int = 0,
    checkpointing: bool = False,
    store_kv: StoreKv | None = None,
) -> torch.Tensor:
    """Returns the last hidden states [b, t − start, d] of the positions from ``start`` on.

    The last layer computes only keys and values for the positions before ``start``.

    Args:
        blocks: the trunk.
        adapter: the adapter set, or ``None`` for the bare base.
        tokens: [b, t].
        attention_mask: [b, t], 0 on padding, or ``None`` without padding.
        start: first position of the result.
        checkpointing: keep only each layer's input and recompute the layer in the backward.
        store_kv: receives every layer's keys and values.
    """
    b, t = tokens.shape
    ids = positions(attention_mask)
    if ids is None:
        ids = torch.arange(t, device=tokens.device)[None]
    x = blocks.embed(tokens, ids).view(b * t, -1)
    mask = CausalMask(tokens, attention_mask)
    context = _Context(mask, blocks.scale, adapter, blocks.backend, blocks.rotary_at(x, ids))
    last = len(blocks.layers) - 1
    for index, block in enumerate(blocks.layers):
        arguments = (block, context, x, start if index == last else 0)
        if checkpointing:
            x = checkpoint(_run_layer, *arguments, None, index, use_reentrant=False, preserve_rng_state=False)
        else:
            x = _run_layer(*arguments, store_kv, index)
    return blocks.norm(x).view(b, t - start, -1)


def _run_layer(
    block: Block, context: _Context, x: torch.Tensor, start: int, store_kv: StoreKv | None, index: int
) -> torch.Tensor:
    """Runs one layer: [m, d] to [b (t − start), d]."""
    mask, scale, adapter, backend, rotary = context
    qkv = block.qkv.forward(block.norm_1(x), adapter, backend)
    if rotary is not None:
        qkv = rotary_(qkv, *rotary, block.layout.rotary_part, backend=backend)
    if store_kv is not None:
        _, key, value = (part.view(mask.b, mask.t, *part.shape[1:]) for part in block.layout.split(qkv))
        store_kv(index, key.transpose(1, 2), value.transpose(1, 2))
    span = AttentionSpan(start=start, window=block.window, scale=scale)
    attended = causal_attention(qkv, block.layout, mask, span, backend=backend)
    if start:
        x = x.view(mask.b, mask.t, -1)[:, start:].reshape(attended.shape[0], -1)
    del qkv
    attention_out = block.out.forward(attended, adapter, backend)
    del attended
    mlp_in = x if block.parallel else x + attention_out
    inner = _activate(block, block.up.forward(block.norm_2(mlp_in), adapter, backend), backend)
    out = mlp_in + block.down.forward(inner, adapter, backend)
    return out + attention_out if block.parallel else out


def _activate(block: Block, up: torch.Tensor, backend: str) -> torch.Tensor:
    if not block.gated:
        return block.activation(up)
    if block.activation is nn.functional.silu:
        return swiglu(up, backend=backend)
    gate, rest = up.chunk(2, dim=-1)
    return block.activation(gate) * rest
