"""Memory parts of a module's weights: adapters, heads, base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

# Attributes under which transformers (sequence and token classification) and TRL (value head) keep a scalar head.
_HEAD_NAMES = ("score", "classifier", "v_head")


def weights_by_part(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (part, tensor) for every parameter and buffer of ``model``.

    Weights of PEFT layers are ``adapters``. The output embedding and the heads called ``score``, ``classifier`` or
    ``v_head`` are ``heads``. The rest is ``base`` and is yielded first, so that an output embedding tied to the input
    embedding counts as ``base`` when the first declaration wins.
    """
    heads = _head_modules(model)
    adapters = _adapter_modules(model, heads)
    by_part: dict[str, list[torch.Tensor]] = {"base": [], "adapters": [], "heads": []}
    for module in model.modules():
        part = "adapters" if module in adapters else "heads" if module in heads else "base"
        by_part[part] += [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    for part, tensors in by_part.items():
        yield from ((part, tensor) for tensor in tensors)


def _adapter_modules(model: nn.Module, heads: set[nn.Module]) -> set[nn.Module]:
    """Modules that PEFT added. Every PEFT layer lists their names, so PEFT itself need not be imported.

    The trainable copy that PEFT makes of a head (``modules_to_save``) is no adapter.
    """
    return {
        inner
        for layer in model.modules()
        for name in getattr(layer, "adapter_layer_names", ())
        if isinstance(module := getattr(layer, name, None), nn.Module)
        and not (name == "modules_to_save" and layer in heads)
        for inner in module.modules()
    }


def _head_modules(model: nn.Module) -> set[nn.Module]:
    heads = []
    for module in model.modules():
        heads += [getattr(module, name, None) for name in _HEAD_NAMES]
        if hasattr(module, "get_output_embeddings"):
            heads.append(module.get_output_embeddings())  # type: ignore[operator]
    return {inner for head in heads if isinstance(head, nn.Module) for inner in head.modules()}


def state_tensors(state: object) -> Iterator[torch.Tensor]:
    """Yields the tensors of an optimizer's ``state``, however deep in mappings and lists (LBFGS keeps lists)."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (Mapping, list, tuple)):
        for value in state.values() if isinstance(state, Mapping) else state:
            yield from state_tensors(value)
