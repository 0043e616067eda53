"""The steps of decoding in C: every op with its addresses is written down once a generation, and a step replays them.

What is left of a step is reading the weights: no call, no allocation, and no wait but that of the threads for each
other between two ops.

Shapes: b = batch, d = hidden size, n = positions that a cache can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from rlhfkernels.engine.fast.blocks import Block, Blocks, Norm, gelu_tanh
from rlhfkernels.models.cache import PreallocatedLayer
from rlhfkernels.ops.forms import takes_native
from rlhfkernels.ops.lora_linear import LinearGroup
from rlhfkernels.ops.native.tape import Segment, tape_for
from rlhfkernels.ops.skinny_linear import MOST_NATIVE_ROWS

# By the name that the tape knows them under.
_ACTIVATIONS: dict[Callable[[torch.Tensor], torch.Tensor], str] = {
    nn.functional.silu: "silu",
    gelu_tanh: "gelu_tanh",
    nn.functional.gelu: "gelu",
    nn.functional.relu: "relu",
}


class NativeSteps:
    """A tape over the layers; see ``Steps``.

    Args:
        blocks: the trunk.
        adapter: the adapter set, or ``None`` for the bare base.
        x: [b, d], like every step's.
        caches: of the layers, with the prompt in them.
    """

    def __init__(
        self, blocks: Blocks, adapter: str | None, x: torch.Tensor, caches: Sequence[PreallocatedLayer]
    ) -> None:
        self._caches = caches
        self._memory: dict[str, torch.Tensor] = {}
        self._x, self._out = torch.empty_like(x), torch.empty_like(x)
        self._turns = blocks.turn_table(x, caches[0].max_len)
        self._tape = tape_for(x)
        for block, cache in zip(blocks.layers, caches, strict=True):
            self._write_layer(block, blocks.scale, adapter, cache)
        if self._tape is not None:
            self._write_norm(blocks.norm, self._out)

    @staticmethod
    def cover(blocks: Blocks, adapter: str | None, x: torch.Tensor) -> bool:
        """Whether the ops in C know all of these layers and tensors, and are the faster ones for this many rows."""
        if x.shape[0] > MOST_NATIVE_ROWS or any(block.activation not in _ACTIVATIONS for block in blocks.layers):
            return False
        groups = [p.under(adapter) for block in blocks.layers for p in block.projections]
        adapters = [group.down for group in groups if group.down is not None]
        return takes_native(blocks.kernels, x, *(group.weight for group in groups), *adapters)

    def run(self, x: torch.Tensor, positions: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """See ``Steps.run``."""
        self._x.copy_(x)
        if self._tape is not None:
            self._tape.run(written=self._caches[0].get_seq_length(), positions=positions, mask=attention_mask)
        for cache in self._caches:
            cache.length += 1
        return self._out

    def _buffer(self, name: str, *shape: int) -> torch.Tensor:
        """Memory that every layer uses again; of a larger one, the beginning."""
        numel = torch.Size(shape).numel()
        if name not in self._memory or self._memory[name].numel() < numel:
            self._memory[name] = self._x.new_empty(numel)
        return self._memory[name][:numel].view(shape)

    def _write_layer(self, block: Block, scale: float, adapter: str | None, cache: PreallocatedLayer) -> None:
        b, d = self._x.shape
        heads = block.heads
        qkv, out, up, down = (projection.under(adapter) for projection in block.projections)
        normed = self._buffer("normed", b, d)
        states = self._buffer("qkv", b, qkv.weight.shape[0])
        attended = self._buffer("attended", b, out.weight.shape[1])
        scores = self._buffer("scores", b, heads.num_queries, cache.max_len)
        widened = self._buffer("up", b, up.weight.shape[0])
        inner = self._buffer("inner", b, down.weight.shape[1])
        self._buffer("low", b, max(0 if g.down is None else g.down.shape[0] for g in (qkv, out, up, down)))
        if self._tape is None:
            return
        assert cache.keys is not None
        assert cache.values is not None
        self._write_norm(block.norm_1, normed)
        self._write_linear(qkv, normed, states)
        self._tape.decode_attention(
            states,
            attended,
            cache.keys,
            cache.values,
            scores,
            heads=heads,
            turns=self._turns,
            window=block.window,
            scale=scale,
        )
        if block.parallel:
            self._write_norm(block.norm_2, normed)
        self._write_linear(out, attended, self._x, adds=True)
        if not block.parallel:
            self._write_norm(block.norm_2, normed)
        self._write_linear(up, normed, widened)
        self._tape.activation(widened, inner, kind=_ACTIVATIONS[block.activation], gated=block.gated)
        self._write_linear(down, inner, self._x, adds=True)

    def _write_norm(self, norm: Norm, out: torch.Tensor) -> None:
        assert self._tape is not None
        self._tape.norm(self._x, norm.weight, norm.bias, out, eps=norm.eps, centred=norm.centred)

    def _write_linear(self, group: LinearGroup, x: torch.Tensor, out: torch.Tensor, *, adds: bool = False) -> None:
        """The low-rank projection, scaled, and then everything that reads it."""
        assert self._tape is not None
        segments: list[Segment] = []
        low: torch.Tensor | None = None
        if group.down is not None:
            ranks = [part.down.shape[0] for part in group.parts]
            starts = [sum(ranks[:i]) for i in range(len(ranks))]
            projected = [
                Segment(start=start, stop=start + rank, scale=part.scaling)
                for part, start, rank in zip(group.parts, starts, ranks, strict=True)
            ]
            low = self._buffer("low", x.shape[0], group.down.shape[0])
            self._tape.skinny_linear(x, group.down, low, segments=projected)
            segments = [
                Segment(start=part.columns.start, stop=part.columns.stop, up=part.up, low_offset=start)
                for part, start in zip(group.parts, starts, strict=True)
            ]
        if group.transposed:
            self._tape.skinny_linear(x, group.weight.t(), out, bias=group.bias, transposed=True, adds=adds)
            if segments:
                self._tape.skinny_linear(x, None, out, low=low, segments=segments, adds=True)
        else:
            covered = _covering(segments, out.shape[1])
            self._tape.skinny_linear(x, group.weight, out, bias=group.bias, low=low, segments=covered, adds=adds)


def _covering(segments: Sequence[Segment], outputs: int) -> list[Segment]:
    """``segments``, which are in order, with plain ones in between: all of the outputs."""
    found: list[Segment] = []
    at = 0
    for segment in segments:
        if segment.start > at:
            found.append(Segment(start=at, stop=segment.start))
        found.append(segment)
        at = segment.stop
    if at < outputs:
        found.append(Segment(start=at, stop=outputs))
    return found
