"""Fast decoding: the prompt in one forward pass, then one step a token, with buffers allocated once a generation."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from rlhfkernels.engine.fast.blocks import Blocks
from rlhfkernels.engine.fast.capture import make_capture
from rlhfkernels.engine.fast.decode_steps import DecodeSteps
from rlhfkernels.engine.fast.forward_pass import run_blocks
from rlhfkernels.engine.fast.graph_decode import GraphDecodeSteps
from rlhfkernels.engine.fast.native_decode import NativeDecodeSteps
from rlhfkernels.engine.fast.row_decode import RowDecodeSteps
from rlhfkernels.engine.fast.torch_decode import TorchDecodeSteps
from rlhfkernels.engine.trunk import CacheSkips
from rlhfkernels.models.cache import PreallocatedLayer
from rlhfkernels.observer import Observer


class FastDecoder(CacheSkips):
    """One generation in progress; see ``Decoder``.

    Args:
        blocks: the trunk.
        adapter: the adapter set, or ``None`` for the bare base.
        max_len: maximum number of positions.
        observer: told of the KV cache.
        cuda_graphs: as in ``EngineOptions``.
    """

    def __init__(
        self, blocks: Blocks, adapter: str | None, max_len: int, observer: Observer, cuda_graphs: str = "off"
    ) -> None:
        self._blocks, self._adapter, self._cuda_graphs = blocks, adapter, cuda_graphs
        self._caches = [
            PreallocatedLayer(max_len, lambda tensors: observer.tag("kv_cache", tensors)) for _ in blocks.layers
        ]
        self._cache = Cache(layers=self._caches)
        self._observer = observer
        self._steps: DecodeSteps | None = None

    @torch.no_grad()
    def advance(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """See ``Decoder.advance``."""
        cache_len = self._caches[0].get_seq_length()
        if cache_len == 0:
            last = tokens.shape[1] - 1
            x = run_blocks(self._blocks, self._adapter, tokens, attention_mask, start=last, store_kv=self._store_kv)
            return x.squeeze(1)
        tokens = tokens[:, 0]
        positions = torch.full_like(tokens, cache_len) if attention_mask is None else attention_mask.sum(-1) - 1
        x = self._blocks.embed(tokens, positions)
        if self._steps is None:
            self._steps = self._make_steps(x)
        return self._steps.run(x, positions, attention_mask)

    def _make_steps(self, x: torch.Tensor) -> DecodeSteps:
        """Makes what executes the steps of rows ``x`` [b, d]."""
        if takes_graphs(x, self._cuda_graphs) and not self._blocks.are_gathered:
            capture = make_capture(x, self._observer, is_required=self._cuda_graphs == "on")
            return GraphDecodeSteps(self._blocks, self._adapter, x, self._caches, capture)
        return _class_of_steps(self._blocks, self._adapter, x)(self._blocks, self._adapter, x, self._caches)

    def _store_kv(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._caches[index].update(key, value)


def takes_graphs(x: torch.Tensor, cuda_graphs: str) -> bool:
    """Returns whether the steps of rows ``x`` [b, d] are captured as CUDA graphs."""
    return x.device.type == "cuda" and cuda_graphs != "off"


def _class_of_steps(blocks: Blocks, adapter: str | None, x: torch.Tensor) -> type[DecodeSteps]:
    """Returns what executes the steps of rows ``x`` [b, d] without graphs."""
    if blocks.are_gathered or not x.is_cpu:
        return RowDecodeSteps
    return NativeDecodeSteps if NativeDecodeSteps.supports(blocks, adapter, x) else TorchDecodeSteps
