"""Fast forward passes over whole sequences: one loop over the blocks, for prompts, for scoring and for training.

A layer keeps for its backward the inputs of its matmuls, norms and attention, and nothing else. The caller names the
adapter set: no module is switched.

Shapes: b = batch, t = positions, m = b t, d = hidden size, k = key-value heads, e = head size, s = rotated elements of
a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlhfkernels.engine.fast.blocks import Block, Blocks
from rlhfkernels.engine.trunk import kept_rows, positions
from rlhfkernels.ops.attention_mask import AttentionSpan, CausalMask, Segment
from rlhfkernels.ops.causal_attention import causal_attention, packed_attention
from rlhfkernels.ops.qkv_layout import QkvLayout
from rlhfkernels.ops.rotary import rotary_
from rlhfkernels.ops.swiglu import swiglu

# Receives a layer's index, its keys and its values, [b, k, t, e] each.
StoreKv = Callable[[int, torch.Tensor, torch.Tensor], object]


class _Sequences(Protocol):
    """Division of the m rows of a layer's input into sequences, and the rows that the layer's output keeps."""

    def attention(
        self, qkv: torch.Tensor, layout: QkvLayout, *, window: int | None, scale: float, backend: str
    ) -> torch.Tensor:
        """Returns causal attention of every sequence at the kept rows, [kept, h e]."""

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the kept rows [kept, d] of ``x``, [m, d]."""


class _Padded(NamedTuple):
    """Sequences of one length, of which the positions from ``start`` on are kept."""

    mask: CausalMask
    start: int

    def attention(
        self, qkv: torch.Tensor, layout: QkvLayout, *, window: int | None, scale: float, backend: str
    ) -> torch.Tensor:
        """See ``_Sequences.attention``."""
        span = AttentionSpan(start=self.start, window=window, scale=scale)
        return causal_attention(qkv, layout, self.mask, span, backend=backend)

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """See ``_Sequences.kept``."""
        b, t = self.mask.b, self.mask.t
        return x.view(b, t, -1)[:, self.start :].reshape(b * (t - self.start), -1) if self.start else x


class _Packed(NamedTuple):
    """Sequences of any lengths without padding, one after the other."""

    segments: tuple[Segment, ...]

    def attention(
        self, qkv: torch.Tensor, layout: QkvLayout, *, window: int | None, scale: float, backend: str
    ) -> torch.Tensor:
        """See ``_Sequences.attention``."""
        return packed_attention(qkv, layout, self.segments, window=window, scale=scale, backend=backend)

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """See ``_Sequences.kept``."""
        return kept_rows(x, self.segments)


class _Context(NamedTuple):
    """Inputs that all layers of a forward pass share.

    Attributes:
        scale: of the attention scores.
        adapter: the adapter set.
        backend: see ``Blocks``.
        rotary: cosines and signed sines, [1 or b, t, s] each.
    """

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
    mask = CausalMask(tokens, attention_mask)

    def store(index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        if store_kv is not None:
            store_kv(index, *(part.view(b, t, *part.shape[1:]).transpose(1, 2) for part in (key, value)))

    x = _run_layers(blocks, adapter, tokens, ids, (_Padded(mask, 0), _Padded(mask, start)), checkpointing, store)
    return x.view(b, t - start, -1)


def run_packed(
    blocks: Blocks,
    adapter: str | None,
    tokens: torch.Tensor,
    ids: torch.Tensor,
    segments: Sequence[Segment],
    *,
    checkpointing: bool = False,
) -> torch.Tensor:
    """Returns the last hidden states of a packed row; see ``Trunk.packed``.

    Args:
        blocks: the trunk.
        adapter: the adapter set, or ``None`` for the bare base.
        tokens: [m].
        ids: [m], positions that begin at 0 in every sequence.
        segments: the sequences in their order.
        checkpointing: keep only each layer's input and recompute the layer in the backward.
    """
    whole = _Packed(tuple(segment._replace(start=0) for segment in segments))
    sequences = whole, _Packed(tuple(segments))
    return _run_layers(blocks, adapter, tokens[None], ids[None], sequences, checkpointing, None)


def _run_layers(
    blocks: Blocks,
    adapter: str | None,
    tokens: torch.Tensor,
    ids: torch.Tensor,
    sequences: tuple[_Sequences, _Sequences],
    checkpointing: bool,
    store_kv: StoreKv | None,
) -> torch.Tensor:
    """Embeds, runs all layers and the last norm: [m] to [kept, d]. The second of ``sequences`` is the last layer's."""
    x = blocks.embed(tokens, ids).view(tokens.numel(), -1)
    context = _Context(blocks.scale, adapter, blocks.backend, blocks.rotary_at(x, ids))
    last = len(blocks.layers) - 1
    for index, block in enumerate(blocks.layers):
        run = functools.partial(_run_layer, block, context, sequences[index == last], store_kv, index)
        if checkpointing:  # inside the block, which has the weights at hand when it is run again
            run = functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        x = block.run(run, x)
    return blocks.norm(x)


def _run_layer(
    block: Block, context: _Context, sequences: _Sequences, store_kv: StoreKv | None, index: int, x: torch.Tensor
) -> torch.Tensor:
    """Runs one layer: [m, d] to [kept, d]. ``store_kv`` receives keys and values as [m, k, e]."""
    scale, adapter, backend, rotary = context
    qkv = block.qkv.forward(block.norm_1(x), adapter, backend)
    if rotary is not None:
        qkv = rotary_(qkv, *rotary, block.layout.rotary_part, backend=backend)
    if store_kv is not None:
        store_kv(index, *block.layout.split(qkv)[1:])
    attended = sequences.attention(qkv, block.layout, window=block.window, scale=scale, backend=backend)
    x = sequences.kept(x)
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
