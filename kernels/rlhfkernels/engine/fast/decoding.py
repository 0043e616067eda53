"""Decoding the fast way: the prompt in one pass, then a step a token over memory that is laid out once a generation."""

from __future__ import annotations

from typing import Protocol

import torch
from transformers.cache_utils import Cache

from rlhfkernels.engine.fast.blocks import Blocks
from rlhfkernels.engine.fast.native_steps import NativeSteps
from rlhfkernels.engine.fast.passes import run_blocks
from rlhfkernels.engine.fast.torch_steps import TorchSteps
from rlhfkernels.engine.trunk import CacheSkips
from rlhfkernels.models.cache import PreallocatedLayer
from rlhfkernels.observer import Observer


class Steps(Protocol):
    """Every step of a generation after its prompt, one position a row each."""

    def run(self, x: torch.Tensor, positions: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Goes through the layers, and writes one position into every cache.

        Args:
            x: [b, d], the embedded tokens; may be overwritten.
            positions: [b].
            attention_mask: [b, n], 0 on padding; ``None`` where nothing is padded.

        Returns:
            The last hidden states, [b, d], which the next step may overwrite.
        """
        ...


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
        self._steps: Steps | None = None

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
        positions = torch.full_like(tokens, seen) if attention_mask is None else attention_mask.sum(-1) - 1
        x = self._blocks.embed(tokens, positions)
        if self._steps is None:
            form = NativeSteps if NativeSteps.cover(self._blocks, self._adapter, x) else TorchSteps
            self._steps = form(self._blocks, self._adapter, x, self._caches)
        return self._steps.run(x, positions, attention_mask)
