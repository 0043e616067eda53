"""The trained weights of an engine, written as PEFT and transformers read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from rlhfkernels.config.case import Case
from rlhfkernels.methods.method import Method
from rlhfkernels.models.adapters import Adapters
from rlhfkernels.models.heads import ScalarHead
from rlhfkernels.models.loading import LoadedModel
from rlhfkernels.models.saving import save_model


def write_weights(
    folder: Path,
    case: Case,
    method: Method,
    models: Mapping[str, LoadedModel],
    adapters: Mapping[str, Adapters],
    scalar_heads: Mapping[str, ScalarHead],
) -> None:
    """Writes the bases that are trained, every adapter set and every scalar head; see ``Engine.save``."""
    names = {base: case.model_of(method.origins[base]) for base in models}
    for base in method.trained_bases:
        save_model(models[base], names[base], folder / base)
    for base, sets in adapters.items():
        prefix = models[base].prefix if models[base].lm_head is not None else None
        for name in sets.names:
            sets.save(name, folder / name, prefix=prefix, base_model=names[base])
    for role, head in scalar_heads.items():
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"weight": head.weight.detach().cpu().contiguous()}, folder / f"{role}_head.safetensors")
