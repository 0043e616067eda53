"""The ops of a decode step, layer by layer, whatever executes them.

Shapes: b = batch, d = hidden size.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from rlhfkernels.engine.fast.blocks import Block, Blocks, Norm
from rlhfkernels.engine.fast.projections import Projection
from rlhfkernels.models.cache import PreallocatedLayer


class DecodeSteps(ABC):
    """Decode steps of one generation after its prompt, one position a row each.

    ``emit_layers`` walks over the layers and calls an op's method for each op. ``TorchDecodeSteps`` executes the ops at
    once, every step; ``NativeDecodeSteps`` records them as a program and replays it.

    Args:
        blocks: the trunk.
        adapter: the adapter set, or ``None`` for the bare base.
        x: [b, d], as in every step.
        caches: KV caches of the layers, which hold the prompt.
    """

    def __init__(
        self, blocks: Blocks, adapter: str | None, x: torch.Tensor, caches: Sequence[PreallocatedLayer]
    ) -> None:
        self._blocks, self._adapter, self._caches = blocks, adapter, caches

    @abstractmethod
    def run(self, x: torch.Tensor, positions: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Runs one step and writes one position into every cache.

        Args:
            x: [b, d], the embedded tokens; may be overwritten.
            positions: [b].
            attention_mask: [b, n], 0 on padding; ``None`` without padding.

        Returns:
            The last hidden states, [b, d], which the next step may overwrite.
        """

    def emit_layers(self, x: torch.Tensor) -> None:
        """Emits the ops of all layers, which add to ``x`` in place."""
        for index, block in enumerate(self._blocks.layers):
            block.run(functools.partial(self._emit_layer, index, block), x)

    def _emit_layer(self, index: int, block: Block, x: torch.Tensor) -> torch.Tensor:
        attended = self.attention(index, self.linear("qkv", block.qkv, self.norm(block.norm_1, x)))
        # A parallel MLP reads the layer's input, before attention is added to it.
        normed = self.norm(block.norm_2, x) if block.parallel else None
        self.add_linear(block.out, attended, x)
        up = self.linear("up", block.up, self.norm(block.norm_2, x) if normed is None else normed)
        self.add_linear(block.down, self.activation(block, up), x)
        return x

    @abstractmethod
    def norm(self, norm: Norm, x: torch.Tensor) -> torch.Tensor:
        """Normalizes ``x``."""

    @abstractmethod
    def linear(self, name: str, projection: Projection, x: torch.Tensor) -> torch.Tensor:
        """Computes a projection of ``x``; ``name`` is that of its buffer."""

    @abstractmethod
    def add_linear(self, projection: Projection, x: torch.Tensor, out: torch.Tensor) -> None:
        """Adds a projection of ``x`` to ``out``, [b, d]."""

    @abstractmethod
    def attention(self, index: int, qkv: torch.Tensor) -> torch.Tensor:
        """Rotates queries and keys, writes keys and values into the cache of layer ``index``, and attends over it."""

    @abstractmethod
    def activation(self, block: Block, up: torch.Tensor) -> torch.Tensor:
        """Computes the activation of the MLP, multiplied by the ungated half if it is gated."""
