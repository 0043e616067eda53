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

from rlhfkernels.engine.fast.blocks import Block, Blocks
from rlhfkernels.engine.trunk import positions
from rlhfkernels.ops.causal_attention import causal_attention
from rlhfkernels.ops.rotary import rotary_
from rlhfkernels.ops.sight import Reach, Sight
from rlhfkernels.ops.swiglu import swiglu

# Told of a layer's index, its keys and its values, [b, k, t, e] each.
Keep = Callable[[int, torch.Tensor, torch.Tensor], object]


class _Frame(NamedTuple):
    """What every layer of a pass shares.

    Attributes:
        sight: the batch, and who sees whom in it.
        scale: of the attention scores.
        adapter: the adapter set that is on.
        kernels: see ``Blocks``.
        turns: rotary cosines and signed sines, [1 or b, t, s] each.
    """

    sight: Sight
    scale: float
    adapter: str | None
    kernels: str
    turns: tuple[torch.Tensor, torch.Tensor] | None


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
    sight = Sight(tokens, attention_mask)
    frame = _Frame(sight, blocks.scale, adapter, blocks.kernels, blocks.turns(x, ids))
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
    sight, scale, adapter, kernels, turns = frame
    qkv = block.qkv.many(block.norm_1(x), adapter, kernels)
    if turns is not None:
        qkv = rotary_(qkv, *turns, block.heads.rotary_part, kernels=kernels)
    if keep is not None:
        _, key, value = (part.view(sight.b, sight.t, *part.shape[1:]) for part in block.heads.split(qkv))
        keep(index, key.transpose(1, 2), value.transpose(1, 2))
    reach = Reach(start=start, window=block.window, scale=scale)
    attended = causal_attention(qkv, block.heads, sight, reach, kernels=kernels)
    if start:
        x = _from(x, sight.b, start)
    del qkv
    mixed = block.out.many(attended, adapter, kernels)
    del attended
    middle = x if block.parallel else x + mixed
    inner = _activated(block, block.up.many(block.norm_2(middle), adapter, kernels), kernels)
    total = middle + block.down.many(inner, adapter, kernels)
    return total + mixed if block.parallel else total


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
