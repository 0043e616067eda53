"""Trained models, written as transformers reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM

from rlhfkernels.models.configuration import read_config
from rlhfkernels.models.loading import LoadedModel


def save_model(model: LoadedModel, name: str, folder: Path) -> None:
    """Writes a whole model: configuration and safetensors, without adapters.

    Args:
        model: with a language-model head it is read by ``AutoModelForCausalLM``, without one by ``AutoModel``.
        name: of the model that it was loaded from, whose configuration it keeps.
        folder: created where it does not exist.

    Raises:
        ModelError: the configuration of ``name`` cannot be read any more.
    """
    # The loaded configuration has its dropout set to 0; the file's own must reach the file.
    config = read_config(name)
    owner = AutoModel if model.lm_head is None else AutoModelForCausalLM
    with torch.device("meta"):
        shell = owner.from_config(config, dtype=model.trunk.dtype)
    prefix = f"{model.prefix}." if model.lm_head is not None else ""
    # An adapter wraps a linear layer as ``base_layer``. The fast trunk keeps weights side by side in one storage.
    state = {
        prefix + key.replace(".base_layer.", "."): _own(tensor)
        for key, tensor in _tensors(model.trunk)
        if ".lora_" not in key
    }
    if model.lm_head is not None:
        state |= _head_state(model, shell)
    shell.save_pretrained(folder, state_dict=state)


def _head_state(model: LoadedModel, shell: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The head under transformers' name; nothing where it is tied to the embedding."""
    head, tied = model.lm_head, {id(parameter) for parameter in model.trunk.parameters()}
    assert head is not None
    place = shell.get_output_embeddings()  # type: ignore[operator]
    owner = next(key for key, module in shell.named_modules() if module is place)
    return {
        f"{owner}.{key}": _own(parameter) for key, parameter in head.named_parameters() if id(parameter) not in tied
    }


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of ``module.state_dict()``, which ``fully_shard`` changes: it would divide gathered weights."""
    yield from module.named_parameters(remove_duplicate=False)
    for name, child in module.named_modules():
        for key, buffer in child.named_buffers(recurse=False):
            if key not in child._non_persistent_buffers_set:
                yield f"{name}.{key}" if name else key, buffer


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
