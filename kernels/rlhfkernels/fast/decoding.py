"""Decoding the fast way: the prompt in one pass, then one lean loop over the blocks a token.

A step reads all weights for a handful of rows, so its time is theirs plus that of every call in between: products stay
in the layout in which they come out ([outputs, rows]), their memory and the views into it are made once a generation,
queries and keys turn together, and keys and values are written by one copy.

Shapes: b = batch, d = hidden size, h = query heads, e = head size, n = positions so far, s = rotated part of a head.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from rlhfkernels.cache import PreallocatedLayer
from rlhfkernels.fast.blocks import Block, Blocks
from rlhfkernels.fast.passes import run_blocks
from rlhfkernels.observer import Observer
from rlhfkernels.ops.decode_attention import decode_attention
from rlhfkernels.ops.rotary import signed
from rlhfkernels.trunk import CacheSkips

_Turns = tuple[torch.Tensor, torch.Tensor]


class FastDecoder(CacheSkips):
    """One generation in progress.

    Args:
        blocks: the trunk.
        adapter: the adapter set, or ``None`` for the bare base.
        max_len: positions that will be seen at most.
        observer: told of the cache.
    """

    def __init__(self, blocks: Blocks, adapter: str | None, max_len: int, observer: Observer) -> None:
        self._blocks, self._adapter, self._max_len = blocks, adapter, max_len
        self._caches = [
            PreallocatedLayer(max_len, lambda tensors: observer.tag("kv_cache", tensors)) for _ in blocks.layers
        ]
        self._cache = Cache(layers=self._caches)
        self._observer = observer
        self._layers: list[_Layer] = []
        self._tables: _Turns | None = None

    @torch.no_grad()
    def advance(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """See ``Decoder.advance``."""
        if self._caches[0].get_seq_length() == 0:
            last = tokens.shape[1] - 1
            x = run_blocks(self._blocks, self._adapter, tokens, attention_mask, start=last, keep=self._keep)
            return x.squeeze(1)
        return self._step(tokens[:, 0], attention_mask)

    def _keep(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._caches[index].update(key, value)

    def _step(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        seen = self._caches[0].get_seq_length()
        mask = None if attention_mask is None else attention_mask.bool()
        positions = torch.full_like(tokens, seen) if attention_mask is None else attention_mask.sum(-1) - 1
        x = self._blocks.embed(tokens, positions)
        if not self._layers:
            self._prepare(x)
        turns = self._turns(slice(seen, seen + 1) if attention_mask is None else positions)
        for layer, cache in zip(self._layers, self._caches, strict=True):
            layer.run(x, cache, turns, mask)
        return self._blocks.norm(x)

    def _prepare(self, x: torch.Tensor) -> None:
        """What every later step uses again."""
        buffers: dict[int, torch.Tensor] = {}
        rows, scale = x.shape[0], self._blocks.scale
        self._layers = [_Layer(block, scale, self._adapter, rows, buffers) for block in self._blocks.layers]
        if self._blocks.rotary is not None:
            cos, sin = self._blocks.rotary(x, torch.arange(self._max_len, device=x.device)[None])
            self._tables = cos[0], signed(sin)[0]

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
