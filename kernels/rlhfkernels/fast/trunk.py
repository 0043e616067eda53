"""The fast path of a trunk: decoding by a lean loop over the layers' products; all else as the plain path does it.

Decoding is where the general modules cost most: every step reads all weights for a handful of rows, and dozens of small
calls a layer stand between those reads. Full-length passes are products of many rows, which the plain path runs at the
machine's rate already.

Shapes: b = batch, d = hidden size, h = query heads, k = key-value heads, e = head size, n = positions so far.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from rlhfkernels.adapters import Adapters
from rlhfkernels.cache import PreallocatedLayer
from rlhfkernels.case import Case
from rlhfkernels.fast.blocks import Block, Blocks, read_blocks
from rlhfkernels.models import LoadedModel
from rlhfkernels.observer import Observer
from rlhfkernels.ops.decode_attention import decode_attention
from rlhfkernels.trunk import CacheSkips, Decoder, PlainTrunk


class FastTrunk(PlainTrunk):
    """A trunk whose architecture the fast path covers.

    Args:
        case: its options say how.
        model: the trunk.
        adapters: its adapter sets.
        blocks: what the fast path read of the trunk.
    """

    name = "fast"

    def __init__(self, case: Case, model: LoadedModel, adapters: Adapters, blocks: Blocks) -> None:
        super().__init__(case, model, adapters)
        self._blocks = blocks

    def decoder(self, adapter: str | None, max_len: int, observer: Observer) -> Decoder:
        """See ``Trunk.decoder``."""
        self._adapters.activate(adapter)
        self._module.eval()
        return _FastDecoder(self._module, self._blocks, adapter, max_len, observer)


def make_fast_trunk(case: Case, model: LoadedModel, adapters: Adapters) -> PlainTrunk:
    """The fast path where it covers the model and the case's options, else the plain one; ``name`` says which."""
    if case.options.attention == "sdpa" and case.options.kv_cache == "preallocated":
        blocks = read_blocks(model.trunk)
        if blocks is not None:
            return FastTrunk(case, model, adapters, blocks)
    return PlainTrunk(case, model, adapters)


class _FastDecoder(CacheSkips):
    """The prompt through the modules, every token after it through the blocks; both write into one cache."""

    def __init__(self, module: Any, blocks: Blocks, adapter: str | None, max_len: int, observer: Observer) -> None:
        self._module, self._blocks, self._adapter = module, blocks, adapter
        self._layers = [
            PreallocatedLayer(max_len, lambda tensors: observer.tag("kv_cache", tensors)) for _ in blocks.layers
        ]
        self._cache = Cache(layers=self._layers)
        self._observer = observer
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None
        self._max_len = max_len

    @torch.no_grad()
    def advance(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """See ``Decoder.advance``."""
        if self._layers[0].get_seq_length() == 0:
            ids = None if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp_(min=0)
            output = self._module(
                input_ids=tokens,
                attention_mask=attention_mask,
                position_ids=ids,
                past_key_values=self._cache,
                use_cache=True,
            )
            prompt: torch.Tensor = output.last_hidden_state[:, -1]
            return prompt
        return self._step(tokens[:, 0], attention_mask)

    def _step(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        seen = self._layers[0].get_seq_length()
        if attention_mask is None:
            positions = torch.full_like(tokens, seen)
            mask = None
        else:
            positions = attention_mask.sum(-1) - 1
            mask = attention_mask.bool()
        x = self._blocks.embed(tokens, positions)
        turns = self._turns(x, seen, None if attention_mask is None else positions)
        for block, layer in zip(self._blocks.layers, self._layers, strict=True):
            x = self._through(block, layer, x, turns, mask)
        return self._blocks.norm(x)

    def _through(
        self,
        block: Block,
        layer: PreallocatedLayer,
        x: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """One layer over [b, d]; its input is overwritten."""
        heads = block.split(block.qkv(block.norm_1(x), self._adapter).t().contiguous())
        query, key, value = heads
        if turns is not None:
            query, key = _rotate(query, *turns), _rotate(key, *turns)
        keys, values = layer.append(key, value)
        n = keys.shape[2]
        if block.window is not None and n > block.window:
            keys, values = keys[:, :, n - block.window :], values[:, :, n - block.window :]
            mask = None if mask is None else mask[:, n - block.window :]
        attended = decode_attention(query, keys, values, scale=self._blocks.scale, mask=mask)
        mixed = block.out(attended.reshape(attended.shape[0], -1), self._adapter).t()
        middle = x if block.parallel else x.add_(mixed)
        up = block.up(block.norm_2(middle), self._adapter)
        if block.gated:
            width = up.shape[0] // 2
            inner = block.activation(up[:width]).mul_(up[width:])
        else:
            inner = block.activation(up)
        down = block.down(inner.t().contiguous(), self._adapter).t()
        return middle.add_(mixed).add_(down) if block.parallel else middle.add_(down)

    def _turns(
        self, x: torch.Tensor, seen: int, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and signed sines of the rotary embedding, [b or 1, 1, e]: the same row for all, or each row's own."""
        if self._blocks.rotary is None:
            return None
        if self._tables is None:
            every = torch.arange(self._max_len, device=x.device)[None]
            cos, sin = self._blocks.rotary(x, every)
            half = sin.shape[-1] // 2
            self._tables = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
        cos, sin = self._tables
        if positions is None:
            return cos[seen : seen + 1, None], sin[seen : seen + 1, None]
        return cos[positions][:, None], sin[positions][:, None]


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [b, h, e]; where it covers only the first part of a head, the rest stays."""
    width = cos.shape[-1]
    turned = heads if width == heads.shape[-1] else heads[..., :width]
    turned = torch.addcmul(turned * cos, turned.roll(width // 2, -1), sin)
    return turned if width == heads.shape[-1] else torch.cat([turned, heads[..., width:]], -1)
