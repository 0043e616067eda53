"""Full-length passes of a trunk the fast way: one loop over its blocks, for prompts, for scoring and with a graph.

A layer keeps for its backward what its products and its attention read, and nothing else: the input of each norm, the
normalised input, the rotated heads, attention's result, the gate with the up part, and their product. The adapter set
is named by the caller: no module is switched.

Shapes: b = batch, t = positions, m = b t, d = hidden size, h = query heads, k = key-value heads, e = head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlhfkernels.fast.blocks import Block, Blocks
from rlhfkernels.ops.rotary import rotary_
from rlhfkernels.ops.swiglu import swiglu
from rlhfkernels.trunk import positions

# Told of a layer's index, its keys and its values, [b, k, t, e] each.
Keep = Callable[[int, torch.Tensor, torch.Tensor], object]


class _Frame(NamedTuple):
    """What every layer of a pass shares.

    Attributes:
        b, t: the batch.
        scale: of the attention scores.
        adapter: the adapter set that is on.
        kernels: see ``Blocks``.
        turns: rotary cosines and signed sines, [1 or b, t, s] each.
        masks: by window, who may look at whom, [1 or b, 1, t, t]; ``None`` where it is everyone at those before.
    """

    b: int
    t: int
    scale: float
    adapter: str | None
    kernels: str
    turns: tuple[torch.Tensor, torch.Tensor] | None
    masks: dict[int | None, torch.Tensor | None]


def run_blocks(
    blocks: Blocks,
    adapter: str | None,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    start: int = 0,
    checkpointing: bool = False,
    keep: Keep | None = None,
) -> torch.Tensor:
    """The last hidden states [b, t − start, d] of the positions from ``start`` on.

    The last layer computes nothing for the positions before it but their keys and values.

    Args:
        blocks: the trunk.
        adapter: the adapter set, or ``None`` for the bare base.
        tokens: [b, t].
        attention_mask: [b, t], 0 on padding, or ``None`` where nothing is padded.
        start: the first position that is asked for.
        checkpointing: keep each layer's input only, and run the layer again in the backward.
        keep: is given every layer's keys and values.
    """
    b, t = tokens.shape
    ids = positions(attention_mask)
    if ids is None:
        ids = torch.arange(t, device=tokens.device)[None]
    x = blocks.embed(tokens, ids).view(b * t, -1)
    windows = {block.window for block in blocks.layers}
    masks = {window: _mask(attention_mask, tokens, window) for window in windows}
    frame = _Frame(b, t, blocks.scale, adapter, blocks.kernels, blocks.turns(x, ids), masks)
    last = len(blocks.layers) - 1
    for index, block in enumerate(blocks.layers):
        arguments = (block, frame, x, start if index == last else 0)
        if checkpointing:
            x = checkpoint(_run, *arguments, None, index, use_reentrant=False, preserve_rng_state=False)
        else:
            x = _run(*arguments, keep, index)
    return blocks.norm(x).view(b, t - start, -1)


def _run(block: Block, frame: _Frame, x: torch.Tensor, start: int, keep: Keep | None, index: int) -> torch.Tensor:
    """One layer: [m, d] to [b (t − start), d]."""
    b, t, _, adapter, kernels, turns, masks = frame
    qkv = block.qkv.many(block.norm_1(x), adapter)
    if turns is not None:
        qkv = rotary_(qkv, *turns, block.heads.rotary_part, kernels=kernels)
    query, key, value = (heads.view(b, t, *heads.shape[1:]).transpose(1, 2) for heads in block.heads.split(qkv))
    if keep is not None:
        keep(index, key, value)
    attended = _attended(query, key, value, masks[block.window], frame.scale, start)
    if start:
        x = _from(x, b, start)
    del qkv, query, key, value
    mixed = block.out.many(attended.transpose(1, 2).reshape(x.shape[0], -1), adapter)
    del attended
    middle = x if block.parallel else x + mixed
    inner = _activated(block, block.up.many(block.norm_2(middle), adapter), kernels)
    total = middle + block.down.many(inner, adapter)
    return total + mixed if block.parallel else total


def _attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float, start: int
) -> torch.Tensor:
    """Causal attention, [b, h, t − start, e], of the positions from ``start`` on."""
    # A GPU's kernels without a mask are so much better that they may as well attend from every position.
    first = start if mask is not None or _masks_are_cheap(query.device) else 0
    if first:
        mask = _causal(key.shape[2], key.device)[None, None] if mask is None else mask
        query, mask = query[:, :, first:], mask[:, :, first:]
    attended = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended[:, :, start - first :]


def _masks_are_cheap(device: torch.device) -> bool:
    """Whether attention with a mask of its own is about as fast as causal attention."""
    return device.type == "cpu"


def _from(x: torch.Tensor, b: int, start: int) -> torch.Tensor:
    """The rows [b (t − start), d] of the positions from ``start`` on."""
    return x.view(b, -1, x.shape[-1])[:, start:].reshape(-1, x.shape[-1])


def _activated(block: Block, up: torch.Tensor, kernels: str) -> torch.Tensor:
    if not block.gated:
        return block.activation(up)
    if block.activation is nn.functional.silu:
        return swiglu(up, kernels=kernels)
    gate, rest = up.chunk(2, dim=-1)
    return block.activation(gate) * rest


def _causal(t: int, device: torch.device) -> torch.Tensor:
    return torch.ones(t, t, dtype=torch.bool, device=device).tril_()


def _mask(attention_mask: torch.Tensor | None, tokens: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """Who may look at whom, [b or 1, 1, t, t]; ``None`` where it is everyone at those before."""
    t = tokens.shape[1]
    if attention_mask is None and (window is None or t <= window):
        return None
    mask = _causal(t, tokens.device)[None]
    if window is not None:
        mask = mask.triu(1 - window)
    if attention_mask is not None:
        # Padding sees itself, so that no row is empty: a softmax over nothing is not a number, and that would spread.
        itself = torch.eye(t, dtype=torch.bool, device=tokens.device)
        mask = (mask & attention_mask.bool()[:, None]) | itself
    return mask[:, None]
