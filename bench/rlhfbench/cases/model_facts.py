"""Facts about models that are known without loading them. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from rlhfbench.cases.weights import check_gguf
from rlhfkernels.config.rules import shown
from rlhfkernels.errors import ModelError
from rlhfkernels.models.fields import POSITION_FIELDS
from rlhfkernels.models.presets import PRESETS
from rlhfkernels.naming import unknown

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Sizes of a configuration, by the names that architectures give them, and the largest that is no mistake. A layer is
# built on its own, a second for a thousand of them; widths only make numbers larger.
_MAX_SIZES = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 10_000)
_MAX_SIZES |= dict.fromkeys(("hidden_size", "n_embd", "d_model", "num_attention_heads", "n_head", "n_heads"), 2**24)
_MAX_SIZES |= {"vocab_size": 2**31 - 1}
# Names of the width of a model and of the number of its heads.
_HEADS = (("hidden_size", "num_attention_heads"), ("n_embd", "n_head"), ("d_model", "n_heads"))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """Facts about a model that are known without loading it.

    Attributes:
        model_type: name of the architecture in ``transformers``; ``None`` if only the loader knows.
        max_positions: length of the longest sequence; ``None`` if only the loader knows.
        vocab_size: number of tokens; ``None`` if only the loader knows.
        revision: commit of the hub's snapshot that the model is loaded from; ``None`` for other models.
    """

    model_type: str | None
    max_positions: int | None
    vocab_size: int | None = None
    revision: str | None = None


def inspect_model(model: str) -> ModelFacts:
    """Looks up a preset, a checkpoint folder, a GGUF file or a Hugging Face model id.

    Raises:
        ModelError: there is no such model, or its config.json or GGUF file is malformed.
    """
    if model in PRESETS:
        preset = PRESETS[model]
        return ModelFacts(
            model_type=preset.model_type,
            max_positions=preset.max_positions,
            vocab_size=preset.config.get("vocab_size"),
        )
    try:
        path = Path(model).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder without permission, ~ of nobody
        reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        raise ModelError(f"model {shown(model)} cannot be read: {reason}.") from error
    if is_folder:
        return _inspect_folder(model, path)
    if is_file:
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"model '{model}' is a file: it must be a .gguf file, or the folder of a checkpoint.")
        check_gguf(model, path)  # a plan reads the file too
        return ModelFacts(model_type=None, max_positions=None)
    if _HUB_ID.fullmatch(model) and not model.startswith("."):
        return _inspect_hub(model)
    if "/" in model or model.startswith(("~", ".")):
        raise ModelError(f"model '{model}' does not exist: there is no such folder or file.")
    raise ModelError(
        unknown("model", model, PRESETS) + " Or the path of a checkpoint folder, or a Hugging Face model id ORG/NAME."
    )


def _inspect_folder(model: str, path: Path) -> ModelFacts:
    config = path / "config.json"
    if not config.is_file():
        what = "adapters without their model" if (path / "adapter_config.json").is_file() else "no config.json"
        raise ModelError(f"model '{model}' is a folder that holds no model: it has {what}.")
    return _facts(model, config)


def _inspect_hub(model: str) -> ModelFacts:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # no warning for every retry
    try:
        path = hf_hub_download(model, "config.json", local_files_only=not _is_hub_reachable())
        return _facts(model, Path(path))
    except LocalEntryNotFoundError:
        reason = "it is not on this machine, and the hub cannot be reached: is there a network?"
    except GatedRepoError:
        reason = "its owner must grant you access first."
    except RepositoryNotFoundError:
        reason = "there is no such folder here, and no such model on the hub."
    except EntryNotFoundError:
        reason = "it holds no model (no config.json)."
    except HFValidationError:
        reason = "there is no such folder here, and a model on the hub cannot have this name."
    except ModelError:
        raise
    except Exception as error:  # of the client, a proxy or HF_ENDPOINT: each has errors of its own
        reason = f"the hub does not answer ({type(error).__name__}): is there a network?"
    raise ModelError(f"model '{model}': {reason}")


def _is_hub_reachable() -> bool:
    """True if a connection opens within 5 s, or behind a proxy. The hub's client itself retries for half a minute."""
    from huggingface_hub.constants import ENDPOINT

    if urllib.request.getproxies():
        return True  # a direct connection says nothing there
    address = urllib.parse.urlsplit(ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True


def _facts(model: str, config_path: Path) -> ModelFacts:
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"model '{model}': its config.json cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"model '{model}': its config.json is not JSON.") from error
    if not isinstance(config, dict):
        raise ModelError(f"model '{model}': its config.json is not an object.")
    _check_sizes(model, config)
    _check_heads(model, config)
    stated = (config.get(key) for key in POSITION_FIELDS)
    positions = next((value for value in stated if isinstance(value, int) and value >= 0), None)  # −1 is no limit
    model_type: Any = config.get("model_type")
    vocabulary: Any = config.get("vocab_size")
    return ModelFacts(
        model_type=model_type if isinstance(model_type, str) else None,
        max_positions=positions,
        vocab_size=vocabulary if isinstance(vocabulary, int) else None,
        revision=config_path.parent.name if config_path.parent.parent.name == "snapshots" else None,
    )


def _check_sizes(model: str, config: dict[str, Any]) -> None:
    """Refuses sizes that are no numbers above 0. The loader judges lists, with one for each layer, and ``null``."""
    for field, largest in _MAX_SIZES.items():
        value = config.get(field)
        if value is None or isinstance(value, list):
            continue
        if type(value) is not int or not 0 < value <= largest:
            raise ModelError(
                f"model '{model}' is invalid: its config.json has {field} {shown(value)}: it must be an integer "
                f"from 1 to {largest}."
            )


def _check_heads(model: str, config: dict[str, Any]) -> None:
    """Refuses heads that do not divide the width, where the width of a head is not given, or key heads the heads."""
    for width, heads in _HEADS:
        total, number = config.get(width), config.get(heads)
        if config.get("head_dim") is None and isinstance(total, int) and isinstance(number, int) and total % number:
            raise ModelError(
                f"model '{model}' is invalid: its config.json has {heads} {number}: it must divide {width} {total}."
            )
    number, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if type(groups) is int and isinstance(number, int) and (groups < 1 or number % groups):
        raise ModelError(
            f"model '{model}' is invalid: its config.json has num_key_value_heads {groups}: it must divide "
            f"num_attention_heads {number}."
        )
