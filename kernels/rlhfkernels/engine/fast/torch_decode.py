"""Decode steps by torch's ops.

A step reads all weights for a few rows, so its time is that of the weights plus the overhead of the calls. Projections
keep the layout of ``skinny_linear``, [outputs, rows]. Their buffers and views are made once a generation. Queries and
keys rotate together, and one copy writes keys and values.

Shapes: b = batch, d = hidden size, h = query heads, k = key-value heads, e = head size, n = cached positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhfkernels.engine.fast.blocks import Block, Blocks, Norm
from rlhfkernels.engine.fast.decode_steps import DecodeSteps
from rlhfkernels.engine.fast.projections import Projection
from rlhfkernels.models.cache import PreallocatedLayer
from rlhfkernels.ops.decode_attention import decode_attention


class TorchDecodeSteps(DecodeSteps):
    """Executes every op at once; see ``DecodeSteps``."""

    def __init__(
        self, blocks: Blocks, adapter: str | None, x: torch.Tensor, caches: Sequence[PreallocatedLayer]
    ) -> None:
        super().__init__(blocks, adapter, x, caches)
        buffers: dict[int, torch.Tensor] = {}
        projections = [projection for block in blocks.layers for projection in block.projections]
        self._linears = {projection: projection.for_decode(adapter, x.shape[0], buffers) for projection in projections}
        self._rotary_table = blocks.rotary_table(x, caches[0].max_len)
        rotary_size = 0 if self._rotary_table is None else self._rotary_table[0].shape[1]
        self._views = [_qkv_views(block, self._linears[block.qkv].out, rotary_size) for block in blocks.layers]
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None
        self._mask: torch.Tensor | None = None

    def run(self, x: torch.Tensor, positions: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """See ``DecodeSteps.run``."""
        if self._rotary_table is not None:
            cache_len = self._caches[0].get_seq_length()
            # Without padding all rows are at one position.
            at = slice(cache_len, cache_len + 1) if attention_mask is None else positions
            cos, signed_sin = self._rotary_table
            self._rotary = cos[at].t(), signed_sin[at].t()
        self._mask = None if attention_mask is None else attention_mask.bool()
        self.emit_layers(x)
        return self._blocks.norm(x)

    def norm(self, norm: Norm, x: torch.Tensor) -> torch.Tensor:
        """Returns [b, d]."""
        return norm(x)

    def linear(self, name: str, projection: Projection, x: torch.Tensor) -> torch.Tensor:
        """Returns [outputs, b]."""
        return self._linears[projection](x)

    def add_linear(self, projection: Projection, x: torch.Tensor, out: torch.Tensor) -> None:
        """See ``DecodeSteps.add_linear``."""
        out.add_(self._linears[projection](x.contiguous()).t())

    def attention(self, index: int, qkv: torch.Tensor) -> torch.Tensor:
        """Returns [b, h e]."""
        rotated, query, keys_values = self._views[index]
        if self._rotary is not None:
            _rotate_(rotated, *self._rotary)
        cache, window, mask = self._caches[index], self._blocks.layers[index].window, self._mask
        cache.append(keys_values)
        keys, values = cache.written
        n = keys.shape[2]
        if window is not None and n > window:
            keys, values = keys[:, :, n - window :], values[:, :, n - window :]
            mask = None if mask is None else mask[:, n - window :]
        attended = decode_attention(query.contiguous(), keys, values, scale=self._blocks.scale, mask=mask)
        return attended.view(attended.shape[0], -1)

    def activation(self, block: Block, up: torch.Tensor) -> torch.Tensor:
        """Returns [b, inner size]."""
        if block.gated:
            gate, rest = up.chunk(2)
            inner = block.activation(gate).mul_(rest)
        else:
            inner = block.activation(up)
        return inner.t()


def _rotate_(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> None:
    """Rotates [blocks, groups, s, b] in place by tables [s, 1 or b]; see ``rotary_``."""
    swapped = x.roll(cos.shape[0] // 2, 2)
    x.mul_(cos).addcmul_(swapped, signed_sin)


def _qkv_views(block: Block, qkv: torch.Tensor, rotary_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views [n, b] as what is rotated, the queries [b, h, e], and the keys and values [2, b, k, e]."""
    grouped = block.layout.grouped(qkv)
    query, keys_values = block.layout.split_grouped(grouped)
    rotated = grouped[:, : block.layout.rotary_part.rotated, :rotary_size]
    return rotated, query.permute(2, 0, 1), keys_values.permute(0, 3, 1, 2)
