"""JSONL files of prompts, demonstrations and preference pairs. Imports no torch.

The shapes are those that TRL's documentation names: a prompt or a completion is a text or a list of chat messages
``{"role", "content"}``; a demonstration is ``prompt`` and ``completion``; a pair is ``prompt``, ``chosen`` and
``rejected``, or ``chosen`` and ``rejected`` alone, which then share their beginning.
"""

from __future__ import annotations

import itertools
import json
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rlhfkernels.config.options import DataOptions
from rlhfkernels.errors import DataError
from rlhfkernels.methods.program import SourceName

Message = dict[str, str]
Text = str | list[Message]
Row = dict[str, Any]
T = TypeVar("T")


MAX_LINE_CHARS = 16_000_000  # far beyond any context


class Demonstration(NamedTuple):
    """A prompt and the completion to learn, with the line of the file that holds them."""

    prompt: Text
    completion: Text
    line: int = 0

    @property
    def texts(self) -> tuple[Text, ...]:
        """The prompt, then the completion."""
        return self.prompt, self.completion


class Pair(NamedTuple):
    """A prompt with a preferred and a rejected completion, with the line of the file that holds them."""

    prompt: Text
    chosen: Text
    rejected: Text
    line: int = 0

    @property
    def texts(self) -> tuple[Text, ...]:
        """The prompt, then the chosen and the rejected completion."""
        return self.prompt, self.chosen, self.rejected


def read_prompts(path: str | Path, field: str = "prompt") -> list[Text]:
    """The prompts of a file, in its order.

    Args:
        path: one JSON object a line; blank lines are skipped.
        field: the field that holds a prompt.

    Raises:
        DataError: the file is missing, empty or malformed; the message names the line.
    """
    return _read("prompts", path, lambda where, line, row: _text(where, row, field))


def read_demonstrations(path: str | Path) -> list[Demonstration]:
    """The demonstrations of a file, in its order.

    Raises:
        DataError: as for ``read_prompts``.
    """
    return _read("demonstrations", path, _demonstration)


def read_pairs(path: str | Path) -> tuple[list[Pair], int]:
    """The preference pairs of a file in its order, and how many were dropped for equal completions.

    Raises:
        DataError: as for ``read_prompts``, or no pair is left.
    """
    found = _read("pairs", path, _pair)
    pairs = [pair for pair in found if pair.chosen != pair.rejected]
    if not pairs:
        raise DataError(f"pairs '{path}': chosen equals rejected in every row, so no pair is left.")
    return pairs, len(found) - len(pairs)


# The rows of the file that a source reads, checked.
READERS: dict[SourceName, Callable[[DataOptions], Sequence[Any]]] = {
    "prompts": lambda data: read_prompts(data.prompts or "", data.prompt_field),
    "demonstrations": lambda data: read_demonstrations(data.demonstrations or ""),
    "pairs": lambda data: read_pairs(data.pairs or "")[0],
}


def _read(kind: str, path: str | Path, parse: Callable[[str, int, Row], T]) -> list[T]:
    try:
        mode = Path(path).stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise DataError(f"{kind} '{path}' is no regular file: every case reads it again, so it must be one.")
        text = Path(path).read_text(encoding="utf-8-sig")
    except IsADirectoryError as error:
        raise DataError(f"{kind} '{path}' is a folder: it must be a file of JSON lines.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{kind} '{path}' is not UTF-8 text: it must be a file of JSON lines.") from error
    except OSError as error:
        raise DataError(f"{kind} '{path}' cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{kind} {str(path)!r} is not a path: it contains a null character.") from error
    # Lines end at line feeds only: JSON strings may hold other characters that str.splitlines splits at.
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{kind} '{path}', line {number}"
        if line.strip():
            rows.append(parse(where, number, _object(where, line)))
    if not rows:
        raise DataError(f"{kind} '{path}' is empty: it must hold at least one row.")
    return rows


def _object(where: str, line: str) -> Row:
    if len(line) > MAX_LINE_CHARS:
        raise DataError(f"{where}: it has {len(line):,} characters, and a row may have {MAX_LINE_CHARS:,}.")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: it is not JSON.") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: it must be a JSON object.")
    return row


def _text(where: str, row: Row, field: str) -> Text:
    if field not in row:
        raise DataError(f"{where}: there is no field {field!r}; its fields are {', '.join(map(repr, row)) or 'none'}.")
    value = row[field]
    if not _is_text(value):
        raise DataError(
            f"{where}: field {field!r} must be a text that is not empty, or a list of messages (role, content)."
        )
    text: Text = value
    if not _has_content(text):
        raise DataError(f"{where}: field {field!r} is empty: its messages have no content.")
    return text


def _demonstration(where: str, line: int, row: Row) -> Demonstration:
    found = Demonstration(_text(where, row, "prompt"), _text(where, row, "completion"), line)
    _check_kinds(where, found)
    return found


def _check_kinds(where: str, row: Demonstration | Pair) -> None:
    """Refuses messages that go on a text: no template tells which of its words are whose."""
    prompt, *completions = row.texts
    if isinstance(prompt, str) and not all(isinstance(completion, str) for completion in completions):
        raise DataError(
            f"{where}: field 'prompt' is a text, and what completes it a list of messages: it must be messages too."
        )


def _pair(where: str, line: int, row: Row) -> Pair:
    chosen, rejected = _text(where, row, "chosen"), _text(where, row, "rejected")
    if "prompt" in row and not _is_repeated(row["prompt"], chosen, rejected):
        pair = Pair(_text(where, row, "prompt"), chosen, rejected, line)
        _check_kinds(where, pair)
        return pair
    if type(chosen) is not type(rejected):
        raise DataError(f"{where}: fields 'chosen' and 'rejected' must both be texts, or both lists of messages.")
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if shared is None and chosen != rejected:
        shared = min(len(chosen), len(rejected)) - 1  # one continues the other: its last part is the completion
    if shared and isinstance(chosen, str) and chosen[shared - 1] == " ":
        shared -= 1  # the token of a word begins with the space before it
    if chosen != rejected and not shared:
        raise DataError(f"{where}: there is no field 'prompt', and 'chosen' and 'rejected' share no beginning.")
    pair = Pair(chosen[:shared], chosen[shared:], rejected[shared:], line)
    parts = ("it", "what follows it in 'chosen'", "what follows it in 'rejected'")
    empty = [part for part, text in zip(parts, pair.texts, strict=True) if not _has_content(text)]
    if chosen != rejected and empty:
        raise DataError(f"{where}: the prompt is what 'chosen' and 'rejected' share, and {empty[0]} has no content.")
    return pair


def _is_repeated(prompt: Any, chosen: Text, rejected: Text) -> bool:
    """True for the text of a message that both chats begin with: published sets repeat it, and TRL leaves it out."""
    if not (isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list)):
        return False
    shared = itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
    return any(message["content"].strip() == prompt.strip() for message, _ in shared)


def _is_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip()) and _is_unicode(value)
    return isinstance(value, list) and bool(value) and all(_is_message(item) for item in value)


def _has_content(text: Text) -> bool:
    """False for texts without a character to read; messages without one have no token where no template adds any."""
    contents = [text] if isinstance(text, str) else [message["content"] for message in text]
    return any(content.strip() for content in contents)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(value.get(key), str) and _is_unicode(value[key]) for key in ("role", "content")
    )


def _is_unicode(text: str) -> bool:
    """Lone surrogates, which JSON can spell, have no UTF-8 form."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
