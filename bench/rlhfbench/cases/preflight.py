"""Checks before a run starts: models, lengths, devices, packages and prompts. Imports no torch."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import logging
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhfbench.cases.ranks import check_ranks
from rlhfbench.cases.settings import changed_options
from rlhfbench.cases.sweep import Sweep
from rlhfbench.cases.weights import check_gguf, check_safetensors
from rlhfbench.errors import SweepError
from rlhfbench.measure.nvml import num_visible_devices, visible_devices
from rlhfkernels.config.case import vocabulary_problem
from rlhfkernels.config.options import OPTION_PACKAGES
from rlhfkernels.config.rules import shown
from rlhfkernels.data.files import READERS, Demonstration, Pair, Text
from rlhfkernels.errors import DataError, ModelError
from rlhfkernels.methods.table import METHODS
from rlhfkernels.models.presets import PRESETS
from rlhfkernels.naming import unknown
from rlhfkernels.ops.native.build import BuildError, library_path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length")
# Sizes of a configuration, by the names that architectures give them, and the largest that is no mistake. A layer is
# built on its own, a second for a thousand of them; widths only make numbers larger.
_MAX_SIZES = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 10_000)
_MAX_SIZES |= dict.fromkeys(("hidden_size", "n_embd", "d_model", "num_attention_heads", "n_head", "n_heads"), 2**24)
_MAX_SIZES |= {"vocab_size": 2**31 - 1}
# Names of the width of a model and of the number of its heads.
_HEADS = (("hidden_size", "num_attention_heads"), ("n_embd", "n_head"), ("d_model", "n_heads"))
# Flags in /proc/cpuinfo, of x86 and Arm; any of them means that the CPU computes in the dtype.
_INSTRUCTIONS = {"bfloat16": {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}}
_DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


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


def check(sweep: Sweep, *, devices: bool = True) -> dict[str, ModelFacts]:
    """Checks everything that ``sweep`` needs, and returns the facts of its models by name.

    Args:
        sweep: the cases.
        devices: check that this machine has their devices.

    Raises:
        SweepError: every problem, one sentence each.
    """
    facts, problems = _inspect(sweep)
    problems += _check_weights(facts)
    for device in dict.fromkeys(case.device for case in sweep.cases) if devices else ():
        problems += _check_device(device)
    problems += check_ranks(sweep.cases, num_cuda_devices) if devices else ()
    for option, packages in OPTION_PACKAGES.items():
        for value in dict.fromkeys(case.options.flat()[option] for case in sweep.cases):
            problems += _check_package(option, value, packages.get(value))
    if any(case.options.engine.backend == "native" for case in sweep.cases):
        problems += _check_compiler()
    problems += _check_tokenizers(case.model for case in sweep.cases if case.data_file and case.model in facts)
    for source, model, data in dict.fromkeys(
        (METHODS[case.method].source, case.model, case.options.data) for case in sweep.cases if case.data_file
    ):
        try:
            check_chat_template(model, READERS[source](data))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise SweepError(problems)
    return facts


def _check_tokenizers(models: Iterable[str]) -> Iterator[str]:
    """One sentence for each checkpoint folder without a tokenizer: a model may be saved without its own."""
    for model in dict.fromkeys(models):
        folder = Path(model).expanduser()
        if model not in PRESETS and folder.is_dir() and not any(True for p in _TOKENIZERS for _ in folder.glob(p)):
            yield f"model '{model}' is a folder without a tokenizer ({', '.join(_TOKENIZERS)}), which data files need."


def check_chat_template(model: str, rows: Iterable[Text | Demonstration | Pair]) -> None:
    """Checks that chat messages have a template, for the folder of a checkpoint; other models show it when loaded.

    Prompts alone may be joined without a template; a completion needs one, which marks where it ends.

    Raises:
        DataError: rows hold messages with completions, and the tokenizer has no chat template.
    """
    config = Path(model).expanduser() / "tokenizer_config.json"
    if not config.is_file() or (config.parent / "chat_template.jinja").is_file():
        return
    is_chat = any(isinstance(row, (Demonstration, Pair)) and not isinstance(row.prompt, str) for row in rows)
    if is_chat and '"chat_template"' not in config.read_text(encoding="utf-8", errors="replace"):
        raise DataError(f"model '{model}': the data holds messages, and its tokenizer has no chat template.")


def notices(sweep: Sweep, cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Warnings about a sweep that can run, one sentence each.

    Args:
        sweep: the cases.
        cpuinfo: Linux's description of the CPU; without it there is no warning.
    """
    return [*_option_notices(sweep), *_backend_notices(sweep), *_dtype_notices(sweep, cpuinfo)]


def _option_notices(sweep: Sweep) -> Iterator[str]:
    """One sentence for each option of a family that has no method in the sweep."""
    groups = {method.family: method.family.lower().replace("-", "_") for method in METHODS.values()}
    unread = set(groups.values()) - {groups[METHODS[case.method].family] for case in sweep.cases}
    changed = (changed_options(dataclasses.asdict(case.options)) for case in sweep.cases)
    for name, value in dict.fromkeys(option for options in changed for option in options.items()):
        if name.split(".")[0] in unread:
            yield f"{name} is {shown(value)}: no method of this sweep reads it."


def _backend_notices(sweep: Sweep) -> Iterator[str]:
    """One sentence if ``engine.backend`` is auto and the ops in C, which it prefers, cannot be used."""
    if any((c.options.engine.backend, c.device, c.dtype) == ("auto", "cpu", "float32") for c in sweep.cases):
        try:
            library_path()
        except BuildError as error:
            yield f"engine.backend is 'auto': torch runs in place of the ops in C ({error})."


def _dtype_notices(sweep: Sweep, cpuinfo: Path) -> list[str]:
    """One sentence for each dtype that the CPU emulates."""
    dtypes = dict.fromkeys(case.dtype for case in sweep.cases if case.device == "cpu")
    try:
        words = set(cpuinfo.read_text().split())
    except OSError:
        return []
    return [
        f"dtype {dtype} on cpu: this CPU has no instructions for it and emulates it, up to hundreds of times slower "
        "than float32. Do not compare its times with those of other devices."
        for dtype in dtypes
        if dtype in _INSTRUCTIONS and not words & _INSTRUCTIONS[dtype]
    ]


def check_models(sweep: Sweep) -> None:
    """Checks what planning needs: the models, and that every length fits them.

    Raises:
        SweepError: every problem, one sentence each.
    """
    _, problems = _inspect(sweep)
    if problems:
        raise SweepError(problems)


def _inspect(sweep: Sweep) -> tuple[dict[str, ModelFacts], list[str]]:
    problems: list[str] = []
    facts: dict[str, ModelFacts] = {}
    for model in dict.fromkeys(model for case in sweep.cases for model in case.models):
        try:
            facts[model] = inspect_model(model)
        except ModelError as error:
            problems.append(str(error))
    problems += [*_check_positions(sweep, facts), *_check_vocabularies(sweep, facts), *_check_stop_tokens(sweep, facts)]
    return facts, problems


def _check_weights(models: Iterable[str]) -> Iterator[str]:
    """One sentence for each checkpoint folder whose weights cannot be loaded. Plans need none."""
    for model in models:
        if model not in PRESETS and (folder := Path(model).expanduser()).is_dir():
            try:
                check_safetensors(model, folder)
            except ModelError as error:
                yield str(error)


def inspect_model(model: str) -> ModelFacts:
    """Looks up a preset, a checkpoint folder, a GGUF file or a hub id.

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
    raise ModelError(unknown("model", model, PRESETS) + " Or the path of a checkpoint folder, or a hub id ORG/NAME.")


def _inspect_folder(model: str, path: Path) -> ModelFacts:
    config = path / "config.json"
    if not config.is_file():
        what = "adapters without their model" if (path / "adapter_config.json").is_file() else "no config.json"
        raise ModelError(f"model '{model}' is a folder that holds no model: it has {what}.")
    if not any(True for pattern in _WEIGHTS for _ in path.glob(pattern)):
        raise ModelError(f"model '{model}' is a folder that holds no model: it has no weights ({', '.join(_WEIGHTS)}).")
    return _facts(model, config)


def _inspect_hub(model: str) -> ModelFacts:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
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
    except (HfHubHTTPError, OSError) as error:
        reason = f"the hub does not answer ({type(error).__name__}): is there a network?"
    raise ModelError(f"model '{model}': {reason}")


def _is_hub_reachable() -> bool:
    """True if a connection opens within 5 s, or behind a proxy. The hub's client itself retries for half a minute."""
    from huggingface_hub.constants import ENDPOINT

    if urllib.request.getproxies():
        return True  # a direct connection says nothing there
    address = urllib.parse.urlsplit(ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def _facts(model: str, config_path: Path) -> ModelFacts:
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"model '{model}': its config.json is not JSON.") from error
    if not isinstance(config, dict):
        raise ModelError(f"model '{model}': its config.json is not an object.")
    _check_sizes(model, config)
    _check_heads(model, config)
    positions = next((config[key] for key in _POSITION_KEYS if isinstance(config.get(key), int)), None)
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
                f"model '{model}' is invalid: its config.json has {field} {shown(value)}: it must be a whole number "
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


def _check_positions(sweep: Sweep, facts: dict[str, ModelFacts]) -> Iterator[str]:
    for case in sweep.cases:
        for model in case.models:
            limit = facts[model].max_positions if model in facts else None
            if limit is not None and case.seq_len > limit:
                yield (
                    f"a length of {case.seq_len} ({case.prompt_len} + {case.completion_len}) is too long for model "
                    f"'{model}': it has {limit} positions."
                )


def _check_vocabularies(sweep: Sweep, facts: dict[str, ModelFacts]) -> Iterator[str]:
    for models in dict.fromkeys(case.models for case in sweep.cases):
        known = {model: facts[model].vocab_size for model in models if model in facts}
        sizes = {model: size for model, size in known.items() if size is not None}
        if len(set(sizes.values())) > 1:
            yield vocabulary_problem(sizes)


def _check_stop_tokens(sweep: Sweep, facts: dict[str, ModelFacts]) -> Iterator[str]:
    for model, token in dict.fromkeys((case.model, case.options.rollout.stop_token_id) for case in sweep.cases):
        size = facts[model].vocab_size if model in facts else None
        if token is not None and size is not None and token >= size:
            yield f"rollout.stop_token_id is {token}: it must be below {size}, the vocabulary of model '{model}'."


def _check_device(device: str) -> Iterator[str]:
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return
    number = num_cuda_devices()
    if number == 0:
        yield f"device '{device}': this machine has no CUDA device."
    elif int(index or 0) >= number:
        yield f"device '{device}': this machine has {number} CUDA device{'s' if number > 1 else ''}, counted from 0."
    elif importlib.metadata.version("torch").endswith("+cpu"):
        yield f"device '{device}': the installed torch is built for the CPU only."


def _check_package(option: str, value: str, package: str | None) -> Iterator[str]:
    if package is not None and importlib.util.find_spec(package) is None:
        yield (
            f"{option} is {value!r}: it needs {package}, which is not installed "
            f"(pip install {package}; planning does not need it)."
        )


def _check_compiler() -> Iterator[str]:
    try:
        library_path()
    except BuildError as error:
        yield f"engine.backend is 'native': its C code cannot be compiled here ({error})."


def num_cuda_devices() -> int:
    """Number of devices that CUDA sees under ``CUDA_VISIBLE_DEVICES``, according to the driver, without torch."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # NVML fails in many ways; Linux lists the devices here too
        files = sorted(_DRIVER_GPUS.glob("*/information"))
        return len(visible_devices(len(files), lambda: [_driver_uuid(file) for file in files]))
    try:
        return num_visible_devices(pynvml)
    finally:
        pynvml.nvmlShutdown()


def _driver_uuid(information: Path) -> str:
    """The UUID in a device's file of the driver."""
    lines = information.read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("GPU UUID")), "")
