"""Checks before a run starts: models, lengths, devices, packages and prompts. Imports no torch."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

from rlhfbench.cases.model_facts import ModelFacts, inspect_model
from rlhfbench.cases.ranks import check_ranks
from rlhfbench.cases.settings import changed_options
from rlhfbench.cases.sweep import Sweep
from rlhfbench.cases.weights import check_weights
from rlhfbench.errors import SweepError
from rlhfbench.measure.nvml import num_cuda_devices
from rlhfkernels.config.case import stop_token_problem, vocabulary_problem
from rlhfkernels.config.options import OPTION_PACKAGES
from rlhfkernels.config.rules import shown
from rlhfkernels.data.files import READERS, Demonstration, Pair, Text
from rlhfkernels.errors import DataError, ModelError
from rlhfkernels.methods.table import METHODS
from rlhfkernels.models.presets import PRESETS
from rlhfkernels.ops.native.build import BuildError, library_path

_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
# Flags in /proc/cpuinfo, of x86 and Arm; any of them means that the CPU computes in the dtype.
_INSTRUCTIONS = {"bfloat16": {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}}


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
    problems += _device_problems(sweep) if devices else ()
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


def check_devices(sweep: Sweep) -> None:
    """Checks that this machine has the devices of ``sweep``.

    Raises:
        SweepError: one sentence for each device that it lacks.
    """
    problems = _device_problems(sweep)
    if problems:
        raise SweepError(problems)


def _device_problems(sweep: Sweep) -> list[str]:
    devices = dict.fromkeys(case.device for case in sweep.cases)
    return [problem for device in devices for problem in _check_device(device)]


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
        DataError: rows hold messages with completions, and the tokenizer has no chat template, or cannot be read.
    """
    config = Path(model).expanduser() / "tokenizer_config.json"
    if not config.is_file() or (config.parent / "chat_template.jinja").is_file():
        return
    is_chat = any(isinstance(row, (Demonstration, Pair)) and not isinstance(row.prompt, str) for row in rows)
    try:
        has_template = not is_chat or '"chat_template"' in config.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"model '{model}': its tokenizer_config.json cannot be read: {error.strerror}.") from error
    if not has_template:
        raise DataError(f"model '{model}': the data holds messages, and its tokenizer has no chat template.")


def notices(sweep: Sweep, cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Warnings about a sweep that can run, one sentence each.

    Args:
        sweep: the cases.
        cpuinfo: Linux's description of the CPU; without it there is no warning.
    """
    return [*_option_notices(sweep), *_backend_notices(sweep), *_dtype_notices(sweep, cpuinfo)]


def _option_notices(sweep: Sweep) -> Iterator[str]:
    """One sentence for each option of a group that no method of the sweep reads."""
    groups = {method.family: method.family.lower().replace("-", "_") for method in METHODS.values()}
    unread = set(groups.values()) - {groups[METHODS[case.method].family] for case in sweep.cases}
    if not any(case.role_table.adapter_sets for case in sweep.cases):
        unread.add("lora")
    if all(case.role_table.generate is None for case in sweep.cases):
        unread.add("rollout")
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
                check_weights(model, folder)
            except ModelError as error:
                yield str(error)


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
    sampling = (case for case in sweep.cases if case.role_table.generate is not None)
    for model, token in dict.fromkeys((case.model, case.options.rollout.stop_token_id) for case in sampling):
        size = facts[model].vocab_size if model in facts else None
        if size is not None and (problem := stop_token_problem(model, token, size)) is not None:
            yield problem


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
