"""The steps of decoding by torch's ops: one lean loop over the blocks.

A step reads all weights for a handful of rows, so its time is theirs plus that of every call in between: products stay
in the layout in which they come out ([outputs, rows]), their memory and the views into it are made once a generation,
queries and keys turn together, and keys and values are written by one copy.

Shapes: b = batch, d = hidden size, h = query heads, e = head size, n = positions so far, s = rotated part of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhfkernels.engine.fast.blocks import Block, Blocks
from rlhfkernels.models.cache import PreallocatedLayer
from rlhfkernels.ops.decode_attention import decode_attention

_Turns = tuple[torch.Tensor, torch.Tensor]


class TorchSteps:
    """A lean loop over the layers.

    Args:
        blocks: the trunk.
        adapter: the adapter set, or ``None`` for the bare base.
        x: [b, d], like every step's.
        caches: of the layers, with the prompt in them.
    """

    def __init__(
        self, blocks: Blocks, adapter: str | None, x: torch.Tensor, caches: Sequence[PreallocatedLayer]
    ) -> None:
        self._blocks, self._caches = blocks, caches
        buffers: dict[int, torch.Tensor] = {}
        self._layers = [_Layer(block, blocks.scale, adapter, x.shape[0], buffers) for block in blocks.layers]
        self._tables = blocks.turn_table(x, caches[0].max_len)

    def run(self, x: torch.Tensor, positions: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """See ``Steps.run``."""
        seen = self._caches[0].get_seq_length()
        turns = self._turns(slice(seen, seen + 1) if attention_mask is None else positions)
        mask = None if attention_mask is None else attention_mask.bool()
        for layer, cache in zip(self._layers, self._caches, strict=True):
            layer.run(x, cache, turns, mask)
        return self._blocks.norm(x)

    def _turns(self, positions: slice | torch.Tensor) -> _Turns | None:
        """Cosines and signed sines of the rotary embedding, [s, 1 or b]: the same for all rows, or each row's own."""
        if self._tables is None:
            return None
        cos, sin = self._tables
        return cos[positions].t(), sin[positions].t()


class _Layer:
    """One layer over the rows of a step."""

    def __init__(
        self, block: Block, scale: float, adapter: str | None, rows: int, buffers: dict[int, torch.Tensor]
    ) -> None:
        self._block, self._scale = block, scale
        self._qkv, self._out, self._up, self._down = (
            projection.few(adapter, rows, buffers) for projection in (block.qkv, block.out, block.up, block.down)
        )
        self._seen: torch.Tensor | None = None

    def run(self, x: torch.Tensor, cache: PreallocatedLayer, turns: _Turns | None, mask: torch.Tensor | None) -> None:
        """Adds to ``x``, [b, d], in place."""
        block = self._block
        # Where both parts read the layer's input, the second's is taken before the first is added to it.
        beside = block.norm_2(x) if block.parallel else None
        query = self._turned(self._qkv(block.norm_1(x)), cache, turns)
        keys, values = cache.written
        n = keys.shape[2]
        if block.window is not None and n > block.window:
            keys, values = keys[:, :, n - block.window :], values[:, :, n - block.window :]
            mask = None if mask is None else mask[:, n - block.window :]
        attended = decode_attention(query, keys, values, scale=self._scale, mask=mask)
        x.add_(self._out(attended.view(x.shape[0], -1)).t())
        up = self._up(block.norm_2(x) if beside is None else beside)
        if block.gated:
            gate, rest = up.chunk(2)
            inner = block.activation(gate).mul_(rest)
        else:
            inner = block.activation(up)
        x.add_(self._down(inner.t().contiguous()).t())

    def _turned(self, qkv: torch.Tensor, cache: PreallocatedLayer, turns: _Turns | None) -> torch.Tensor:
        """Rotates [n, b] in place, writes its keys and values into the cache; returns the queries, [b, h, e]."""
        if qkv is not self._seen:
            self._view(qkv)
        if turns is not None:
            cos, sin = turns
            size = cos.shape[0]
            turned = self._rotated if size == self._rotated.shape[2] else self._rotated[:, :, :size]
            swapped = turned.roll(size // 2, 2)
            turned.mul_(cos).addcmul_(swapped, sin)
        cache.append(self._kept)
        return self._query.contiguous()

    def _view(self, qkv: torch.Tensor) -> None:
        """The views of the queries, of keys and values, and of what turns; the same memory at every step."""
        heads = self._block.heads
        grouped = heads.grouped(qkv)
        self._rotated = grouped[:, : heads.rotary_part.rotated]
        query, self._kept = heads.queries_and_kept(grouped)
        self._query = query.permute(2, 0, 1)
        self._kept = self._kept.permute(0, 3, 1, 2)
        self._seen = qkv
