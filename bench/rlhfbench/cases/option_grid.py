"""Options whose value is a list: every combination of their values is a case."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

# A list of one option is for the cases in which another one, a list too, has this value. The others take its default.
_ONLY_WITH = {"parallel.zero_stage": ("parallel.strategy", "deepspeed")}


def combinations(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the values of those ``options`` that are lists, each once; the first list varies slowest."""
    lists = {name: value for name, value in options.items() if isinstance(value, list)}
    found: list[dict[str, Any]] = []
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        for name, (other, needed) in _ONLY_WITH.items():
            if name in chosen and needed in lists.get(other, ()) and chosen[other] != needed:
                del chosen[name]
        combined = {name: value for name, value in options.items() if name not in lists} | chosen
        if combined not in found:
            found.append(combined)
    return found
