"""Results of a part, kept one by one, so that a part that was cut short goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rlhfbench.files import write_atomically

BATCHES_NAME = "batches.json"


class Items:
    """A JSON file of results by key, written after each.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values = read_items(path)

    def add(self, key: str, make: Callable[[], Any]) -> Any:
        """Returns the result of ``key``, made and kept if it is new."""
        if key not in self.values:
            self.values[key] = make()
            write_atomically(self._path, json.dumps(self.values, indent=1) + "\n")
        return self.values[key]


def read_items(path: Path) -> dict[str, Any]:
    """Returns the results in ``path`` by key; empty without a file, or where it holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def worst(errors: Iterable[float]) -> float | None:
    """Returns the largest of ``errors``, or NaN if one is; ``None`` without one.

    ``max`` alone passes over a NaN that comes after a number.
    """
    return max(errors, key=lambda error: (error != error, error), default=None)
