"""The texts of the command line's flags, as values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rlhfbench.errors import SweepError
from rlhfkernels.naming import unknown


def given(**flags: Any) -> dict[str, Any]:
    """The flags that were given."""
    return {name: value for name, value in flags.items() if value not in (None, {})}


def options(pairs: list[str], named: Mapping[str, Any]) -> dict[str, Any]:
    """The options, by dotted name, that ``KEY=VALUE`` texts and flags of their own set."""
    from rlhfbench.cases.sweep import parse_option

    return {**dict(parse_option(pair) for pair in pairs), **given(**named)}


def words(text: str | None, *, joined: bool = True) -> list[str] | None:
    """The words of a text that commas join, or the text as the only word."""
    if text is None:
        return None
    return [word.strip() for word in text.split(",")] if joined else [text]


def numbers(flag: str, text: str | None) -> list[int] | None:
    """Whole numbers that commas join.

    Raises:
        SweepError: one of them is none.
    """
    found = words(text)
    if found is None:
        return None
    wrong = [word for word in found if not re.fullmatch(r"[+-]?\d+", word)]
    if wrong:
        raise SweepError([f"--{flag} has {word!r}: it must be whole numbers, joined by commas." for word in wrong])
    return [int(word) for word in found]


def number(flag: str, text: str | None, kind: type[int] | type[float]) -> float | None:
    """``text`` as a number of ``kind``; click would say that it is none, and not say which text."""
    try:
        return None if text is None else kind(text)
    except ValueError:
        rule = "a whole number" if kind is int else "a number"
        raise SweepError([f"--{flag} is {text!r}: it must be {rule}."]) from None


def settings(text: str | None) -> list[str] | None:
    """The named settings that commas join, each once.

    Raises:
        SweepError: there is no such setting.
    """
    from rlhfkernels.config.settings import SETTINGS

    names = words(text)
    if names is None:
        return None
    wrong = [name for name in names if name not in SETTINGS]
    if wrong:
        raise SweepError([unknown("setting", name, SETTINGS) for name in wrong])
    return list(dict.fromkeys(names))
