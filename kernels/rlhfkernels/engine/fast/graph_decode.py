"""Decode steps that can be captured: every step runs the same ops on the same memory.

What changes from step to step is on the device: the input, the cache slot to write, the positions, the mask. Attention
reads the cache up to a bucket of positions and masks those not yet written, so one capture serves a bucket.

A generation captures anew, as its KV cache is its own. Weights may therefore change or move between generations.

Shapes: b = batch, d = hidden size, n = positions of a bucket, m = ``max_len`` of the caches.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from rlhfkernels.engine.fast.blocks import Block, Blocks
from rlhfkernels.engine.fast.capture import Capture, Step, run_eagerly
from rlhfkernels.engine.fast.row_decode import RowDecodeSteps
from rlhfkernels.models.cache import PreallocatedLayer

# Positions of a bucket. A capture costs about two eager steps; reading the cache up to the end of the bucket costs half
# of this in positions that are masked. Of 400 tokens of Llama-7B at batch 16, an estimated 4 % and 3 %.
BUCKET = 128
# Torch copies a mask for its memory-efficient attention unless its rows begin at multiples of 8 elements.
_ALIGNMENT = 16


class GraphDecodeSteps(RowDecodeSteps):
    """Executes a step of static buffers by ``capture``, once a bucket, and then repeats it; see ``DecodeSteps``.

    Args:
        blocks: as in ``DecodeSteps``.
        adapter: as in ``DecodeSteps``.
        x: as in ``DecodeSteps``.
        caches: as in ``DecodeSteps``; all of one length.
        capture: what turns a step into one that repeats it.
    """

    def __init__(
        self,
        blocks: Blocks,
        adapter: str | None,
        x: torch.Tensor,
        caches: Sequence[PreallocatedLayer],
        capture: Capture = run_eagerly,
    ) -> None:
        super().__init__(blocks, adapter, x, caches)
        self._capture = capture
        self._x, self._out = torch.empty_like(x), torch.empty_like(x)
        self._slot = torch.zeros(1, dtype=torch.int64, device=x.device)
        self._places = torch.arange(_rounded_up(caches[0].max_len, _ALIGNMENT), device=x.device)
        self._positions: torch.Tensor | None = None
        self._attended: torch.Tensor | None = None
        self._masks: dict[int | None, torch.Tensor] = {}
        self._length = 0
        self._repeats: dict[int, Step | None] = {}
        for cache in caches:
            cache.clear_unwritten()

    def run(self, x: torch.Tensor, positions: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """See ``DecodeSteps.run``."""
        slot, max_len = self._caches[0].get_seq_length(), self._caches[0].max_len
        self._x.copy_(x)
        self._slot.fill_(slot)
        if attention_mask is not None:
            self._load_padding(positions, attention_mask)
        length = min(_rounded_up(slot + 1, BUCKET), max_len)
        repeat = self._repeats.get(length)
        if repeat is not None:
            repeat()
        else:
            # What is kept must not hold the step: in a reference cycle, the caches would outlive their generation.
            self._repeats[length] = self._capture(functools.partial(self._step, length))
        for cache in self._caches:
            cache.length += 1
        return self._out

    def _load_padding(self, positions: torch.Tensor, attention_mask: torch.Tensor) -> None:
        """Copies [b] positions and the [b, slot + 1] mask into their buffers."""
        if self._attended is None or self._positions is None:
            self._positions = torch.empty_like(positions)
            shape = (attention_mask.shape[0], self._places.shape[0])
            self._attended = torch.zeros(shape, dtype=torch.bool, device=positions.device)
        self._positions.copy_(positions)
        self._attended[:, : attention_mask.shape[1]].copy_(attention_mask)

    def _step(self, length: int) -> None:
        """Computes ``_out`` from the buffers, and writes one position into every cache. Changes no other buffer.

        Args:
            length: positions of the cache that attention reads.
        """
        self._length = length
        if self._rotary_table is not None:
            cos, signed_sin = self._rotary_table
            # Without padding all rows are at the position of the slot.
            at = self._slot if self._positions is None else self._positions
            self._rotary = cos.index_select(0, at)[:, None], signed_sin.index_select(0, at)[:, None]
        self._masks = {window: self._make_mask(window) for window in {block.window for block in self._blocks.layers}}
        x = self._x.clone()
        self._run_layers(x)
        self._out.copy_(self._blocks.norm(x))
        self._rotary, self._masks = None, {}  # the memory of a capture is free again for the next

    def _make_mask(self, window: int | None) -> torch.Tensor:
        """Returns what is added to the scores, [b or 1, n]: 0 on attended positions, −∞ on the others."""
        places = self._places[: _rounded_up(self._length, _ALIGNMENT)]
        attended = places <= self._slot
        if window is not None and self._length > window:
            attended = attended & (places > self._slot - window)
        attended = attended[None]
        if self._attended is not None:
            attended = attended & self._attended[:, : places.shape[0]]
        mask = torch.zeros(attended.shape, dtype=self._x.dtype, device=self._x.device)
        return mask.masked_fill_(~attended, float("-inf"))[:, : self._length]

    def _cached(
        self, block: Block, cache: PreallocatedLayer, keys_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """See ``RowDecodeSteps._cached``: up to the end of the bucket, with a mask."""
        cache.write(self._slot, keys_values)
        return *cache.first(self._length), self._masks[block.window]


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
