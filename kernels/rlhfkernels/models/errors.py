"""Errors of reading, building and running a model, as one sentence that names the model and the fault."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlhfkernels.errors import ModelError, RlhfKernelsError
from rlhfkernels.models.presets import PRESETS

# Out of memory is an outcome of its own. Errors of this package are sentences already.
_PASSED_ON = (MemoryError, torch.OutOfMemoryError, RlhfKernelsError)


class AttentionError(ModelError):
    """The architecture lacks an attention implementation."""


@contextmanager
def loading_errors(name: str, attention: str | None = None) -> Iterator[None]:
    """Turns every error of reading or building a model into a ModelError, and keeps transformers from logging it.

    The files of a model are the user's, and each of their readers has errors of its own: safetensors, struct, the
    validation of configurations, a division by a number of heads that is 0.

    Args:
        name: of the model, as the case has it.
        attention: the implementation that is asked for, for the message.

    Raises:
        ModelError: in place of any error but one of memory.
    """
    noise = logging.getLogger("transformers")
    level = noise.level
    noise.setLevel(logging.ERROR)
    try:
        yield
    except _PASSED_ON:
        raise
    except Exception as error:
        raise _loading_error(name, attention, error) from error
    finally:
        noise.setLevel(level)


def expanded(name: str) -> str:
    """The name of a model, with the home directory in place of ``~``."""
    return os.path.expanduser(name)  # noqa: PTH111 - a Path would make ./NAME, a folder, look like a preset


def _loading_error(name: str, attention: str | None, error: Exception) -> ModelError:
    if isinstance(error, ImportError):
        return ModelError(f"model {name!r} needs a package that is not installed: {_reason(error)}")
    if "attention implementation" in str(error):
        return _without(attention, name)
    if name not in PRESETS and not Path(expanded(name)).exists():
        return ModelError(
            f"model {name!r} could not be fetched: it is not a local folder or file, and the hub was not reached "
            f"or does not hold it ({_reason(error)})"
        )
    return ModelError(f"model {name!r} could not be loaded: {_reason(error)}")


def _without(attention: str | None, name: str) -> AttentionError:
    return AttentionError(
        f"model {name!r} has no {attention} attention: set engine.attn_implementation to another (eager always works)."
    )


def check_softcap(name: str, config: Any, attention: str) -> None:
    """Checks that ``attention`` computes what the model's configuration asks for.

    sdpa leaves the cap of the scores out. Some versions of transformers (5.17) let Gemma 2 take it, and the result is
    another model's.

    Raises:
        AttentionError: the scores are capped, and the attention is sdpa.
    """
    if attention == "sdpa" and getattr(config, "attn_logit_softcapping", None) is not None:
        raise _without(attention, name)


@contextmanager
def forward_errors(name: str, class_name: str) -> Iterator[None]:
    """Turns an error of a forward pass into a ModelError. An out-of-memory error stays its cause.

    Args:
        name: of the model, as the case has it.
        class_name: the architecture.
    """
    try:
        yield
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ModelError(
            f"model {name!r} cannot be run: {class_name} raised {type(error).__name__} ({_first_line(error)})."
        ) from error


@contextmanager
def running_errors(names: Collection[str]) -> Iterator[None]:
    """Turns any error of a step into a ModelError if a model is the user's: its configuration may describe no model.

    A preset is known to run. An error there is a mistake of this package, and keeps its traceback.

    Args:
        names: of the models, as the case has them.
    """
    try:
        yield
    except _PASSED_ON:
        raise
    except Exception as error:
        own = [repr(name) for name in names if name not in PRESETS]
        if not own:
            raise
        raise ModelError(f"model {' or '.join(own)} cannot be run: {_named(error, _first_line(error))}.") from error


def _reason(error: Exception) -> str:
    """The first line of the message, with the error's name where the message alone says little."""
    line = _first_line(error)
    return line if isinstance(error, (OSError, ValueError, RuntimeError, ImportError)) else _named(error, line)


def _named(error: Exception, line: str) -> str:
    name = type(error).__name__
    return line if line == name else f"{line} ({name})"


def _first_line(error: Exception) -> str:
    """The first line of the message; of one that ends with a colon, the next line too."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return text[:300] or type(error).__name__
