"""Sizes in bytes: ``4GiB``, ``80GB``, ``500M``, a number of bytes."""

from __future__ import annotations

import re

from rlhfbench.errors import SweepError
from rlhfkernels.config.rules import shown

MAX_BYTES = 2**60

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]i?)?B?", re.IGNORECASE)
_UNITS = {"": 1, **{f"{letter}i": 1024**n for n, letter in enumerate("KMGT", start=1)}}
_UNITS |= {letter: 1000**n for n, letter in enumerate("KMGT", start=1)}


def parse_size(field: str, text: str) -> int:
    """Parses a size into bytes.

    Raises:
        SweepError: ``text`` is not a size; the message names ``field``.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise SweepError([f"{field} is {shown(text)}: it must be a size like 4GiB, 500MB or a number of bytes."])
    size = float(match[1]) * _UNITS[(match[2] or "").capitalize()]
    if size > MAX_BYTES:
        raise SweepError([f"{field} is {shown(text)}: it must be at most {MAX_BYTES / 1024**4:,.0f} TiB."])
    return int(size)
