"""Prompts files: JSON lines in, prompts out, and one clear sentence where that cannot be. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhfkernels.errors import PromptsError

Message = dict[str, str]
Prompt = str | list[Message]


def read_prompts(path: str | Path, field: str) -> list[Prompt]:
    """The prompts of a JSONL file, in its order; blank lines are passed over.

    Args:
        path: one JSON object a line.
        field: the field that holds a prompt: a text, or a list of messages ``{"role", "content"}``.

    Raises:
        PromptsError: the file is missing, empty or malformed; the message names the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except IsADirectoryError as error:
        raise PromptsError(f"prompts '{path}' is a folder: it must be a file of JSON lines.") from error
    except UnicodeDecodeError as error:
        raise PromptsError(f"prompts '{path}' is not UTF-8 text: it must be a file of JSON lines.") from error
    except OSError as error:
        raise PromptsError(f"prompts '{path}' cannot be read: {error.strerror}.") from error
    # Split at line feeds only: JSON texts may hold other characters that str.splitlines takes for an end.
    prompts = [
        _parse(f"prompts '{path}', line {number}", line, field)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not prompts:
        raise PromptsError(f"prompts '{path}' is empty: it must hold at least one prompt.")
    return prompts


def _parse(where: str, line: str, field: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise PromptsError(f"{where}: it is not JSON.") from error
    if not isinstance(row, dict):
        raise PromptsError(f"{where}: it is no object with a field {field!r}.")
    if field not in row:
        raise PromptsError(
            f"{where}: there is no field {field!r}; its fields are {', '.join(map(repr, row)) or 'none'}."
        )
    if not _is_prompt(row[field]):
        raise PromptsError(
            f"{where}: field {field!r} must be a text that is not empty, or a list of messages (role, content)."
        )
    prompt: Prompt = row[field]
    return prompt


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, list) and bool(value) and all(_is_message(item) for item in value)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
