"""The static KV cache of generation, allocated once at its full length.

A layer holds keys and values of shape [b, kv heads, max length, head size] and returns views of the positions written
so far. A decode step therefore copies one position, where a cache that grows by concatenation copies the whole past.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, LinearAttentionCacheLayerMixin


class PreallocatedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, written in place.

    Args:
        max_len: number of positions that the buffers hold.
        on_allocate: called with both buffers when they are allocated.
    """

    is_sliding = False

    def __init__(self, max_len: int, on_allocate: Callable[[Iterable[torch.Tensor]], None]) -> None:
        super().__init__()
        self.max_len = max_len
        self.length = 0
        self._on_allocate = on_allocate

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates both buffers in the shape of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        b, heads, _, size = key_states.shape
        if value_states.shape[-1] == size:
            # One buffer for both, so that one copy writes a position's keys and values.
            self._both = key_states.new_empty(2, b, heads, self.max_len, size)
            self.keys, self.values = self._both.unbind(0)
        else:
            self.keys = key_states.new_empty(b, heads, self.max_len, size)
            self.values = value_states.new_empty(b, heads, self.max_len, value_states.shape[-1])
        self._on_allocate((self.keys, self.values))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [b, heads, t, size]; returns views [b, heads, written, size]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def append(self, states: torch.Tensor) -> None:
        """Appends one position's keys and values, [2, b, heads, size]; the buffers must be allocated."""
        self._both.select(3, self.length).copy_(states)
        self.length += 1

    def write(self, slot: torch.Tensor, states: torch.Tensor) -> None:
        """Writes one position's keys and values, [2, b, heads, size], at ``slot``, [1] int64 on the device.

        ``length`` stays as it is.
        """
        self._both.index_copy_(3, slot, states.unsqueeze(3))

    def clear_unwritten(self) -> None:
        """Sets the positions from ``length`` on to 0: a masked NaN would still be one."""
        self._both.narrow(3, self.length, self.max_len - self.length).zero_()

    def first(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns views of the keys and values of the first ``length`` positions, [b, heads, length, size] each."""
        keys, values = self._both.narrow(3, 0, length).unbind(0)
        return keys, values

    @property
    def written(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the keys and values so far, [b, heads, written, size] each."""
        return self.first(self.length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of positions that the next ``query_length`` queries attend to, offset)."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Positions written so far."""
        return self.length

    def get_max_length(self) -> int:
        """Positions that can be written."""
        return self.max_len


def make_cache(kind: str, config: Any, max_len: int, on_allocate: Callable[[Iterable[torch.Tensor]], None]) -> Cache:
    """A cache for one generation: ``static`` or ``dynamic`` (see ``EngineOptions.cache_implementation``)."""
    if kind == "dynamic":
        return DynamicCache(config=config)
    layers = [PreallocatedLayer(max_len, on_allocate) for _ in range(config.num_hidden_layers)]
    return Cache(layers=layers)


def cache_tensors(cache: Cache) -> list[torch.Tensor]:
    """The keys and values that ``cache`` holds now."""
    found = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    return [tensor for pair in found for tensor in pair if tensor is not None]


def skip_cache_to(cache: Cache, length: int) -> None:
    """Sets the length of ``cache`` to ``length`` positions; the contents of skipped positions are undefined."""
    for layer in cache.layers:
        if isinstance(layer, PreallocatedLayer):
            layer.length = length
        else:
            layer.keys = _lengthened(layer.keys, length)
            layer.values = _lengthened(layer.values, length)


def _lengthened(states: torch.Tensor, length: int) -> torch.Tensor:
    b, heads, _, size = states.shape
    return states.new_empty(b, heads, length, size)


def has_other_states(model: Any) -> bool:
    """Returns whether generation with ``model`` keeps more than the keys and values of every layer."""
    layers = DynamicCache(config=model.config).layers
    return model._is_stateful or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
