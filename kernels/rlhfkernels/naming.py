"""Nearest valid names, for messages about unknown ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(field: str, value: object, valid: Iterable[str]) -> str:
    """One sentence saying that ``value`` is no valid ``field``, with the nearest valid names first.

    >>> unknown("method", "hydr", ["full", "hydra"])
    "method 'hydr' is unknown: did you mean 'hydra'? Valid: full, hydra."
    """
    names = list(valid)
    near = difflib.get_close_matches(str(value), names, n=2, cutoff=0.5)
    guess = f"did you mean {' or '.join(repr(name) for name in near)}? " if near else ""
    return f"{field} {value!r} is unknown: {guess}Valid: {', '.join(names)}."
