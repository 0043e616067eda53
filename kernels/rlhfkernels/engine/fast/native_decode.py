"""Decode steps in C: all ops are recorded as a program once a generation, and every step replays it.

What remains of a step is reading the weights: no Python call, no allocation, only the barriers between ops.

Shapes: b = batch, d = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from rlhfkernels.engine.fast.architectures import gelu_tanh
from rlhfkernels.engine.fast.blocks import Block, Blocks, Norm
from rlhfkernels.engine.fast.decode_steps import DecodeSteps
from rlhfkernels.engine.fast.projections import Projection
from rlhfkernels.models.cache import PreallocatedLayer
from rlhfkernels.ops.dispatch import takes_native
from rlhfkernels.ops.native.program import Segment, make_program
from rlhfkernels.ops.skinny_linear import MAX_NATIVE_ROWS

# Names of the activations in ``Program.activation``.
_ACTIVATIONS: dict[Callable[[torch.Tensor], torch.Tensor], str] = {
    nn.functional.silu: "silu",
    gelu_tanh: "gelu_tanh",
    nn.functional.gelu: "gelu",
    nn.functional.relu: "relu",
}


class NativeDecodeSteps(DecodeSteps):
    """Records the ops as a program; see ``DecodeSteps``. Fake tensors get the same buffers and no program."""

    def __init__(
        self, blocks: Blocks, adapter: str | None, x: torch.Tensor, caches: Sequence[PreallocatedLayer]
    ) -> None:
        super().__init__(blocks, adapter, x, caches)
        self._buffers: dict[str, torch.Tensor] = {}
        self._x, self._out = torch.empty_like(x), torch.empty_like(x)
        self._rotary_table = blocks.rotary_table(x, caches[0].max_len)
        self._program = make_program(x)
        downs = [p.under(adapter).down for block in blocks.layers for p in block.projections]
        self._buffer("low", max(0 if down is None else down.shape[0] for down in downs))
        self.emit_layers(self._x)
        self._record_norm(blocks.norm, self._x, self._out)

    @staticmethod
    def supports(blocks: Blocks, adapter: str | None, x: torch.Tensor) -> bool:
        """Returns whether the C has all ops of these layers and is faster than torch for this number of rows."""
        if x.shape[0] > MAX_NATIVE_ROWS or any(block.activation not in _ACTIVATIONS for block in blocks.layers):
            return False
        groups = [p.under(adapter) for block in blocks.layers for p in block.projections]
        adapters = [group.down for group in groups if group.down is not None]
        return takes_native(blocks.backend, x, *(group.weight for group in groups), *adapters)

    def run(self, x: torch.Tensor, positions: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """See ``DecodeSteps.run``."""
        self._x.copy_(x)
        if self._program is not None:
            cache_len = self._caches[0].get_seq_length()
            self._program.run(cache_len=cache_len, positions=positions, mask=attention_mask)
        for cache in self._caches:
            cache.length += 1
        return self._out

    def _buffer(self, name: str, size: int) -> torch.Tensor:
        """Returns [b, size] of a buffer that all layers share."""
        rows = self._x.shape[0]
        numel = rows * size
        if name not in self._buffers or self._buffers[name].numel() < numel:
            self._buffers[name] = self._x.new_empty(numel)
        return self._buffers[name][:numel].view(rows, size)

    def norm(self, norm: Norm, x: torch.Tensor) -> torch.Tensor:
        """Returns [b, d]."""
        out = self._buffer("normed", x.shape[1])
        self._record_norm(norm, x, out)
        return out

    def _record_norm(self, norm: Norm, x: torch.Tensor, out: torch.Tensor) -> None:
        if self._program is not None:
            self._program.norm(x, norm.weight, norm.bias, out, eps=norm.eps, centered=norm.centered)

    def linear(self, name: str, projection: Projection, x: torch.Tensor) -> torch.Tensor:
        """Returns [b, outputs]."""
        out = self._buffer(name, projection.under(self._adapter).weight.shape[0])
        self._record_linear(projection, x, out, accumulate=False)
        return out

    def add_linear(self, projection: Projection, x: torch.Tensor, out: torch.Tensor) -> None:
        """See ``DecodeSteps.add_linear``."""
        self._record_linear(projection, x, out, accumulate=True)

    def _record_linear(self, projection: Projection, x: torch.Tensor, out: torch.Tensor, *, accumulate: bool) -> None:
        """Records the scaled projection of all adapters' A, then the matmuls that read it."""
        if self._program is None:
            return
        group = projection.under(self._adapter)
        segments: list[Segment] = []
        low: torch.Tensor | None = None
        if group.down is not None:
            ranks = [part.down.shape[0] for part in group.parts]
            starts = [sum(ranks[:i]) for i in range(len(ranks))]
            low = self._buffer("low", group.down.shape[0])
            low_segments = [
                Segment(start=start, stop=start + rank, scale=part.scaling)
                for part, start, rank in zip(group.parts, starts, ranks, strict=True)
            ]
            self._program.skinny_linear(x, group.down, low, segments=low_segments)
            segments = [
                Segment(start=part.columns.start, stop=part.columns.stop, up=part.up, low_offset=start)
                for part, start in zip(group.parts, starts, strict=True)
            ]
        record = self._program.skinny_linear
        if not group.transposed:
            covering = _cover(segments, out.shape[1])
            record(x, group.weight, out, bias=group.bias, low=low, segments=covering, accumulate=accumulate)
            return
        record(x, group.weight.t(), out, bias=group.bias, transposed=True, accumulate=accumulate)
        if segments:
            record(x, None, out, low=low, segments=segments, accumulate=True)

    def attention(self, index: int, qkv: torch.Tensor) -> torch.Tensor:
        """Returns [b, h e]."""
        block, cache = self._blocks.layers[index], self._caches[index]
        layout = block.layout
        out = self._buffer("attended", layout.num_heads * layout.head_size)
        scores = self._buffer("scores", layout.num_heads * cache.max_len)
        if self._program is not None:
            assert cache.keys is not None
            assert cache.values is not None
            self._program.decode_attention(
                qkv,
                out,
                cache.keys,
                cache.values,
                scores.view(-1, layout.num_heads, cache.max_len),
                layout=layout,
                rotary=self._rotary_table,
                window=block.window,
                scale=self._blocks.scale,
            )
        return out

    def activation(self, block: Block, up: torch.Tensor) -> torch.Tensor:
        """Returns [b, inner size]."""
        out = self._buffer("inner", up.shape[1] // 2 if block.gated else up.shape[1])
        if self._program is not None:
            self._program.activation(up, out, kind=_ACTIVATIONS[block.activation], gated=block.gated)
        return out


def _cover(segments: Sequence[Segment], num_outputs: int) -> list[Segment]:
    """Fills the gaps between sorted segments with plain ones, up to all outputs."""
    covering: list[Segment] = []
    at = 0
    for segment in segments:
        if segment.start > at:
            covering.append(Segment(start=at, stop=segment.start))
        covering.append(segment)
        at = segment.stop
    if at < num_outputs:
        covering.append(Segment(start=at, stop=num_outputs))
    return covering
