"""Measured seconds, kept in a file: one process measures, others wait for it, and all read the same.

A choice that rests on them must not change between a plan and its run, because implementations differ in memory.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path


def stored_seconds(
    path: Path, names: Iterable[str], measure: Callable[[], Mapping[str, float]]
) -> Mapping[str, float] | None:
    """Returns the seconds of ``names`` in ``path``, measured and kept there if it has none.

    Returns:
        Seconds by name; ``None`` where they cannot be kept.
    """
    import fcntl  # here, as Windows has none: nothing is measured there, since nothing is compiled

    names = list(names)
    seconds = _read(path, names)
    if seconds is not None:
        return seconds
    try:
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released as the file is closed
            seconds = _read(path, names)
            if seconds is None:
                measured = measure()
                _write(path, measured)
                return measured
            return seconds
    except OSError:
        return None


def _read(path: Path, names: Iterable[str]) -> dict[str, float] | None:
    """The stored seconds of ``names``; ``None`` if there are none or the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        seconds = {name: float(found[name]) for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return seconds if all(0 < each < math.inf for each in seconds.values()) else None


def _write(path: Path, seconds: Mapping[str, float]) -> None:
    """Writes whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / path.name
        file.write_text(json.dumps(dict(seconds)), encoding="utf-8")
        file.replace(path)
