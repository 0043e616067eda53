"""Configurations of models: reading them, what they say, and the refusal of those that cannot be run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from rlhfkernels.config.rules import shown
from rlhfkernels.errors import ModelError
from rlhfkernels.models.errors import expanded, loading_errors
from rlhfkernels.models.fields import EVAL_FIELDS, NOISE_FIELDS, NUMBER_FIELDS, POSITION_FIELDS
from rlhfkernels.models.presets import PRESETS

# Rotary embeddings whose frequencies depend on the sequence length.
LENGTH_DEPENDENT_ROTARY = ("dynamic", "longrope")


def read_config(model: str) -> Any:
    """Reads the configuration of a model.

    Raises:
        ModelError: the model is unknown.
    """
    if model in PRESETS:
        preset = PRESETS[model]
        return AutoConfig.for_model(preset.model_type, **preset.config)
    with loading_errors(model):
        return AutoConfig.from_pretrained(**pretrained(model))


def pretrained(model: str) -> dict[str, str]:
    """The arguments with which ``from_pretrained`` finds a model that is no preset."""
    model = expanded(model)
    path = Path(model)
    if path.suffix.lower() == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": model}


def check_config(model: str, config: Any, seq_len: int) -> None:
    """Refuses configurations that this package cannot run.

    Args:
        model: its name, as the case has it.
        config: its configuration.
        seq_len: prompt and completion.

    Raises:
        ModelError: it is no decoder of text alone, a field is no number, or it has too few positions.
    """
    _check_architecture(model, config)
    _check_numbers(model, config)
    limit = max_positions(config)
    if limit is not None and seq_len > limit:
        raise ModelError(f"prompt_len + completion_len is {seq_len}: model {model!r} has {limit} positions at most.")


def _check_architecture(model: str, config: Any) -> None:
    """Refuses what is no decoder of text alone."""
    if config.get_text_config() is not config:
        raise ModelError(f"model {model!r} is multimodal ({config.model_type}): it must read text alone.")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model {model!r} has an encoder ({config.model_type}): it must be a decoder alone.")


def _check_numbers(model: str, config: Any) -> None:
    """Refuses fields that are no finite numbers. ``None`` is the architecture's default; a list has one a layer."""
    for field in NUMBER_FIELDS:
        value = getattr(config, field, None)
        each = value if isinstance(value, list) and value else [value]
        if any(v is not None and not (isinstance(v, (int, float)) and math.isfinite(v)) for v in each):
            raise ModelError(f"model {model!r} has {field} {shown(value)} in its config: it must be a finite number.")


def silence(config: Any) -> None:
    """Turns off what makes a forward pass in train mode random: dropout, and the jitter of routers.

    The configurations inside it too: DBRX's and MPT's dropout is in that of their attention.
    """
    kept = EVAL_FIELDS.get(config.model_type, ())
    for field, value in list(vars(config).items()):
        if field in kept:
            continue
        if any(part in field for part in NOISE_FIELDS) and type(value) in (int, float):
            setattr(config, field, type(value)(0))  # a field of integers takes no float
        elif field in config.sub_configs and value is not None:
            silence(value)


def cut_layers(config: Any, num_layers: int) -> None:
    """Makes ``config`` that of the first ``num_layers`` layers, lists with one item a layer included."""
    whole = config.num_hidden_layers
    for field, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == whole:
            setattr(config, field, value[:num_layers])
    config.num_hidden_layers = num_layers


def max_positions(config: Any) -> int | None:
    """The longest sequence a configuration allows, or ``None`` where it states none. XLNet's −1 is no limit."""
    found = [getattr(config, field, None) for field in POSITION_FIELDS]
    return next((int(value) for value in found if isinstance(value, int) and value >= 0), None)


def rotary_limit(config: Any) -> int | None:
    """Returns the longest sequence for which the rotary embedding stays the same; ``None`` if it always does."""
    rotary = getattr(config, "rope_parameters", None) or {}
    kinds = [each for each in (rotary, *rotary.values()) if isinstance(each, dict)]  # some have one for each layer type
    # A dynamic one changes beyond the model's positions alone: see ``load_causal_lm``.
    changing = [each for each in kinds if each.get("rope_type") == "longrope"]
    limits = [each.get("original_max_position_embeddings") or max_positions(config) for each in changing]
    return min((int(limit) for limit in limits if limit), default=None)


def logit_scale(config: Any) -> float:
    """Returns the factor of the logits after the head.

    The configuration's fields mean different things by architecture. The engine's check at loading refuses those that
    are not known here.
    """
    return _LOGIT_SCALES.get(config.model_type, _logit_scale)(config)


def _field(config: Any, name: str) -> float:
    return float(getattr(config, name, None) or 1.0)


def _logit_scale(config: Any) -> float:
    """Cohere multiplies by ``logit_scale``; Granite and MiniCPM3 divide by ``logits_scaling``."""
    return _field(config, "logit_scale") / _field(config, "logits_scaling")


# By ``model_type``, where the fields mean something else.
_LOGIT_SCALES: dict[str, Callable[[Any], float]] = {
    "hyperclovax": lambda config: _field(config, "logits_scaling"),
    "mpt": lambda config: 1.0,  # has logit_scale; its model does not read it
}
