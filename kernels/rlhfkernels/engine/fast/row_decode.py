"""Decode steps on an accelerator: the ops of full-length forward passes on one position a row.

A step of a few rows is bound by launches and by reading the weights. Results keep their rows contiguous, [b, outputs],
as the accelerator's matmuls and the Triton kernels expect; the transposed layout of ``TorchDecodeSteps`` pays on a CPU
only. Not yet timed on a GPU.

Shapes: b = batch, d = hidden size, h = query heads, k = key-value heads, e = head size, n = cached positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rlhfkernels.engine.fast.blocks import Block, Blocks, Norm
from rlhfkernels.engine.fast.decode_steps import DecodeSteps
from rlhfkernels.engine.fast.projections import Projection
from rlhfkernels.models.cache import PreallocatedLayer
from rlhfkernels.ops.decode_attention import decode_attention, without_plans
from rlhfkernels.ops.rotary import rotary_
from rlhfkernels.ops.swiglu import swiglu


class RowDecodeSteps(DecodeSteps):
    """Executes every op at once; see ``DecodeSteps``."""

    def __init__(
        self, blocks: Blocks, adapter: str | None, x: torch.Tensor, caches: Sequence[PreallocatedLayer]
    ) -> None:
        super().__init__(blocks, adapter, x, caches)
        self._rotary_table = blocks.rotary_table(x, caches[0].max_len)
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None
        self._mask: torch.Tensor | None = None

    def run(self, x: torch.Tensor, positions: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """See ``DecodeSteps.run``."""
        if self._rotary_table is not None:
            cache_len = self._caches[0].get_seq_length()
            cos, signed_sin = self._rotary_table
            # Without padding all rows are at one position: a view, and no gather.
            at = slice(cache_len, cache_len + 1) if attention_mask is None else positions
            self._rotary = cos[at][:, None], signed_sin[at][:, None]
        self._mask = None if attention_mask is None else attention_mask.bool()
        self._run_layers(x)
        return self._blocks.norm(x)

    def _run_layers(self, x: torch.Tensor) -> None:
        """Runs all layers, which add to ``x`` in place."""
        with without_plans(x.device):
            self.emit_layers(x)

    def norm(self, norm: Norm, x: torch.Tensor) -> torch.Tensor:
        """Returns [b, d]."""
        return norm(x)

    def linear(self, name: str, projection: Projection, x: torch.Tensor) -> torch.Tensor:
        """Returns [b, outputs]."""
        return projection.forward(x, self._adapter, self._blocks.backend)

    def add_linear(self, projection: Projection, x: torch.Tensor, out: torch.Tensor) -> None:
        """See ``DecodeSteps.add_linear``."""
        out.add_(projection.forward(x, self._adapter, self._blocks.backend))

    def attention(self, index: int, qkv: torch.Tensor) -> torch.Tensor:
        """Returns [b, h e]."""
        block = self._blocks.layers[index]
        if self._rotary is not None:
            qkv = rotary_(qkv, *self._rotary, block.layout.rotary_part, backend=self._blocks.backend)
        query = block.layout.split(qkv)[0]
        keys, values, mask = self._cached(block, self._caches[index], block.layout.keys_values(qkv))
        attended = decode_attention(query, keys, values, scale=self._blocks.scale, mask=mask)
        return attended.reshape(attended.shape[0], -1)

    def _cached(
        self, block: Block, cache: PreallocatedLayer, keys_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Writes one position into ``cache``; returns what the query attends to: keys, values [b, k, n, e] and a mask.

        Args:
            block: the layer.
            cache: of the layer.
            keys_values: [2, b, k, e].
        """
        cache.append(keys_values)
        keys, values = cache.written
        mask, n = self._mask, keys.shape[2]
        if block.window is not None and n > block.window:
            keys, values = keys[:, :, n - block.window :], values[:, :, n - block.window :]
            mask = None if mask is None else mask[:, n - block.window :]
        return keys, values, mask

    def activation(self, block: Block, up: torch.Tensor) -> torch.Tensor:
        """Returns [b, inner size]."""
        if not block.gated:
            return block.activation(up)
        if block.activation is nn.functional.silu:
            return swiglu(up, backend=self._blocks.backend)
        gate, rest = up.chunk(2, dim=-1)
        return block.activation(gate) * rest
