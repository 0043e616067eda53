"""Sizes in bytes: ``4GiB``, ``80GB``, ``500M``, a number of bytes."""

from __future__ import annotations

import re

from rlhfbench.errors import SweepError

_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]i?)?B?", re.IGNORECASE)
_UNITS = {"": 1, **{f"{letter}i": 1024**n for n, letter in enumerate("KMGT", start=1)}}
_UNITS |= {letter: 1000**n for n, letter in enumerate("KMGT", start=1)}


def parse_size(field: str, text: str) -> int:
    """Parses a size into bytes.

    Raises:
        SweepError: ``text`` is not a size; the message names ``field``.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise SweepError([f"{field} is {text!r}: it must be a size like 4GiB, 500MB or a number of bytes."])
    unit = (match[2] or "").capitalize()
    return int(float(match[1]) * _UNITS[unit])
