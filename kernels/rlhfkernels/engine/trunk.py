"""Trunks: the interface that the engine uses, and the plain trunk through transformers and PEFT.

Shapes: b = batch, t = positions of a sequence, q = new positions, d = hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhfkernels.config.case import Case
from rlhfkernels.errors import CaseError
from rlhfkernels.models.adapters import Adapters
from rlhfkernels.models.cache import PreallocatedLayer, cache_tensors, make_cache, skip_cache_to
from rlhfkernels.models.loading import LoadedModel
from rlhfkernels.observer import Observer
from rlhfkernels.ops.attention_mask import Segment


class Decoder(Protocol):
    """One generation in progress, with its KV cache."""

    def advance(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Reads the next tokens and returns the hidden states at the last one.

        Args:
            tokens: [b, q]: the prompt in the first call, one token a row in later ones.
            attention_mask: [b, cached + q], 0 on padding, or ``None`` without padding.

        Returns:
            [b, d].
        """
        ...

    @property
    def can_skip(self) -> bool:
        """True if ``skip_to`` works, once the prompt has been read."""
        ...

    def skip_to(self, length: int) -> None:
        """Extends the cache to ``length`` positions without reading tokens; the new entries are undefined."""
        ...


class Trunk(Protocol):
    """A base with its adapter sets, which runs with one of them or bare."""

    name: str

    def hidden(
        self,
        adapter: str | None,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        start: int = 0,
        train: bool = False,
    ) -> torch.Tensor:
        """Returns the last hidden states [b, t − start, d] with ``adapter``.

        Args:
            adapter: the adapter set, or ``None`` for the bare base.
            tokens: [b, t].
            attention_mask: [b, t], 0 on padding, or ``None`` without padding.
            start: first position of the result.
            train: whether a backward follows, which must run before the next call of this trunk.
        """
        ...

    def packed(
        self,
        adapter: str | None,
        tokens: torch.Tensor,
        ids: torch.Tensor,
        segments: Sequence[Segment],
        *,
        train: bool = False,
    ) -> torch.Tensor:
        """Returns the last hidden states of sequences that lie in one row without padding, and see themselves alone.

        Args:
            adapter: as in ``hidden``.
            tokens: [m].
            ids: [m], positions that begin at 0 in every sequence.
            segments: the sequences in their order.
            train: as in ``hidden``.

        Returns:
            [sum of length − start, d]: of every sequence the positions from its ``start`` on.
        """
        ...

    def decoder(self, adapter: str | None, max_len: int, observer: Observer) -> Decoder:
        """Starts a generation of at most ``max_len`` positions with ``adapter``; tells ``observer`` of its cache."""
        ...

    def follow_weights(self) -> None:
        """Finds its weights again after a library has moved them into storages of its own."""
        ...


class PlainTrunk:
    """Transformers' modules with PEFT's layers: supports any causal language model.

    Args:
        case: its options select cache and checkpointing.
        model: the trunk.
        adapters: its adapter sets.
    """

    name = "plain"

    def __init__(self, case: Case, model: LoadedModel, adapters: Adapters) -> None:
        self._options = case.options
        self._module = model.trunk
        self._adapters = adapters
        self._checkpointed = _checkpoint_layers(self._module) if self._options.engine.gradient_checkpointing else []

    def hidden(
        self,
        adapter: str | None,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        start: int = 0,
        train: bool = False,
    ) -> torch.Tensor:
        """See ``Trunk.hidden``."""
        return self._forward(adapter, tokens, attention_mask, positions(attention_mask), train)[:, start:]

    def packed(
        self,
        adapter: str | None,
        tokens: torch.Tensor,
        ids: torch.Tensor,
        segments: Sequence[Segment],
        *,
        train: bool = False,
    ) -> torch.Tensor:
        """See ``Trunk.packed``. Transformers makes a block-diagonal mask of ids that begin again within a row."""
        return kept_rows(self._forward(adapter, tokens[None], None, ids[None], train)[0], segments)

    def _forward(
        self,
        adapter: str | None,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        ids: torch.Tensor | None,
        train: bool,
    ) -> torch.Tensor:
        """Returns the hidden states [b, t, d] of all positions."""
        self._adapters.activate(adapter)
        for layer in self._checkpointed:
            # Transformers checkpoints a layer in train mode. What is inside it stays in eval mode: in train mode, the
            # router of PhiMoE draws experts at random.
            layer.training = train
        output = self._module(input_ids=tokens, attention_mask=attention_mask, position_ids=ids, use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def decoder(self, adapter: str | None, max_len: int, observer: Observer) -> Decoder:
        """See ``Trunk.decoder``."""
        self._adapters.activate(adapter)
        self._module.eval()
        return _PlainDecoder(self._module, self._options.engine.cache_implementation, max_len, observer)

    def follow_weights(self) -> None:
        """See ``Trunk.follow_weights``: the modules hold the parameters themselves."""


def _checkpoint_layers(module: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    """Checkpoints every layer of ``module`` in train mode; transformers' own switch has two names, by version.

    Returns:
        The layers.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise CaseError(
            [f"engine.gradient_checkpointing is true: {type(module).__name__} has no layers that allow it."]
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(
            checkpoint, use_reentrant=False, preserve_rng_state=False
        )
    return layers


class CacheSkips:
    """Implements the skipping of ``Decoder`` on the layers of a cache."""

    _cache: Cache
    _observer: Observer

    @property
    def can_skip(self) -> bool:
        """See ``Decoder.can_skip``; sliding-window layers store their positions differently."""
        return all(type(layer) in (PreallocatedLayer, DynamicLayer) for layer in self._cache.layers)

    def skip_to(self, length: int) -> None:
        """See ``Decoder.skip_to``."""
        skip_cache_to(self._cache, length)
        self._observer.tag("kv_cache", cache_tensors(self._cache))


class _PlainDecoder(CacheSkips):
    def __init__(self, module: torch.nn.Module, kind: str, max_len: int, observer: Observer) -> None:
        self._module = module
        self._observer = observer
        self._cache = make_cache(kind, module.config, max_len, lambda tensors: observer.tag("kv_cache", tensors))

    @torch.no_grad()
    def advance(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        ids = positions(attention_mask)
        output = self._module(
            input_ids=tokens,
            attention_mask=attention_mask,
            position_ids=None if ids is None else ids[:, -tokens.shape[1] :],
            past_key_values=self._cache,
            use_cache=True,
        )
        self._observer.tag("kv_cache", cache_tensors(self._cache))
        last: torch.Tensor = output.last_hidden_state[:, -1]
        return last


def kept_rows(x: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
    """Returns [sum of length − start, d]: of every segment of ``x``, [m, d], the positions from its ``start`` on."""
    if not any(segment.start for segment in segments):
        return x
    parts = x.split_with_sizes([segment.length for segment in segments])
    return torch.cat([part[segment.start :] for part, segment in zip(parts, segments, strict=True)])


def positions(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Returns position ids [b, t] that count real tokens, or ``None`` (the model's own 0, 1, 2…) without padding."""
    return None if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp_(min=0)
