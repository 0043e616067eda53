"""The depth of a model: which of its layers are alike, so that a few stand for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rlhfkernels.config.case import Case
from rlhfkernels.models.configuration import read_config
from rlhfkernels.models.loading import with_attention

MAX_PERIOD = 6  # Gemma 3: five layers with a sliding window, one without
_PLAIN = (bool, int, float, str, type(None))
# Parts of the names of attributes that hold the index of a module's layer.
_INDEX_NAMES = ("idx", "index", "layer")
# By model, configuration, dtype and attention: the cases of a sweep share them, and building 32 layers takes 60 ms.
_found: dict[Hashable, Layers | None] = {}


@dataclasses.dataclass(frozen=True, slots=True)
class Layers:
    """The layers of a model.

    Attributes:
        count: number of layers.
        period: smallest p for which every layer is like the one p layers on.
    """

    count: int
    period: int


def alike_layers(case: Case, name: str) -> Layers | None:
    """Compares the layers of a model, on the meta device: their modules, shapes, settings, and the configuration's.

    Args:
        case: names the dtype and the attention implementation.
        name: the model.

    Returns:
        ``None`` if the layers were not found, or have no period of at most ``MAX_PERIOD``.

    Raises:
        ModelError: the model is unknown, or lacks the attention implementation.
    """
    config = read_config(name)
    key = (name, config.to_json_string(), case.dtype, case.options.engine.attn_implementation)
    if key not in _found:
        _found[key] = _compare(config, case, name)
    return _found[key]


def _compare(config: Any, case: Case, name: str) -> Layers | None:
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        return None
    asked = case.options.engine.attn_implementation
    with torch.device("meta"):
        model = with_attention(
            name, AutoModelForCausalLM.from_config, config, dtype=getattr(torch, case.dtype), asked=asked
        )
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not stacks:
        return None
    lists = [value for value in vars(config).values() if isinstance(value, (list, tuple)) and len(value) == count]
    kinds = [(*(_kind(stack[i], i) for stack in stacks), *(str(values[i]) for values in lists)) for i in range(count)]
    period = _period(kinds)
    return None if period is None else Layers(count, period)


def _period(kinds: Sequence[Hashable]) -> int | None:
    for period in range(1, min(MAX_PERIOD, len(kinds) - 1) + 1):
        if all(kinds[i] == kinds[i + period] for i in range(len(kinds) - period)):
            return period
    return None


def _kind(layer: nn.Module, index: int) -> Hashable:
    """All that tells layers apart: classes, shapes and plain attributes, without the layer's own index."""
    return tuple(
        (name, type(module), _tensors(module), _settings(module, index)) for name, module in layer.named_modules()
    )


def _tensors(module: nn.Module) -> Hashable:
    held = {**module._parameters, **module._buffers}
    return tuple((name, None if t is None else (t.shape, t.dtype)) for name, t in held.items())


def _settings(module: nn.Module, index: int) -> Hashable:
    plain: dict[str, Any] = {key: value for key, value in vars(module).items() if isinstance(value, _PLAIN)}
    return tuple((key, "its own" if _is_index(key, value, index) else value) for key, value in plain.items())


def _is_index(key: str, value: object, index: int) -> bool:
    # A bool equals 0 or 1 and is no index: GPT-2's ``scale_attn_by_inverse_layer_idx``.
    return type(value) is int and value == index and any(part in key for part in _INDEX_NAMES)
