"""Lifetimes of storages, and the choice of those that a timeline names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from rlhfkernels.observer import PARTS

PER_PART = 3  # largest storages of a part that a timeline names at each of its points
MAX_LIFETIMES = 256  # of a timeline: 25 kB of JSON


class Lifetime(NamedTuple):
    """A stretch of events in which a storage had one size and belonged to one part.

    Attributes:
        part: Index into ``PARTS``.
        num_bytes: Its size.
        born_event: Event at which the ledger first counted the storage.
        first_event: First event of the stretch.
        end_event: First event after it.
        shape: Of the first tensor on the storage.
        dtype: Of that tensor.
        op: The op that made it, ``None`` for a storage that is older than the ledger.
    """

    part: int
    num_bytes: int
    born_event: int
    first_event: int
    end_event: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    op: Any


def largest(lifetimes: Iterable[Lifetime], events: Sequence[int], num: int = PER_PART) -> list[Lifetime]:
    """The lifetimes that are among the ``num`` largest of their part at one of ``events`` or more, largest first.

    Args:
        lifetimes: Those to choose from; of equals, the first win.
        events: Points of a timeline, rising.
        num: How many of each part.
    """
    points = np.asarray(events)
    places = np.full((len(PARTS), len(points)), num)
    found = []
    for lifetime in sorted(lifetimes, key=lambda each: -each.num_bytes):
        begin, end = np.searchsorted(points, (lifetime.first_event, lifetime.end_event))
        covered = places[lifetime.part, begin:end]
        if (covered > 0).any():
            found.append(lifetime)
        covered -= 1
    return found


def lifetime_columns(lifetimes: Iterable[Lifetime], events: Sequence[int]) -> dict[str, list[Any]]:
    """The largest lifetimes at ``events`` as JSON columns, those with the most bytes times points where room is short.

    Returns:
        ``part``, ``bytes``, ``born_event``, ``first_event``, ``end_event``, ``shape`` (a list), ``dtype`` and ``op``.
    """
    chosen = largest(lifetimes, events)
    points = np.asarray(events)

    def area(lifetime: Lifetime) -> int:
        begin, end = np.searchsorted(points, (lifetime.first_event, lifetime.end_event))
        return lifetime.num_bytes * int(end - begin)

    kept = sorted(sorted(chosen, key=area, reverse=True)[:MAX_LIFETIMES], key=lambda each: each.first_event)
    return {
        "part": [PARTS[each.part] for each in kept],
        "bytes": [each.num_bytes for each in kept],
        "born_event": [each.born_event for each in kept],
        "first_event": [each.first_event for each in kept],
        "end_event": [each.end_event for each in kept],
        "shape": [list(each.shape) for each in kept],
        "dtype": [str(each.dtype).removeprefix("torch.") for each in kept],
        "op": [None if each.op is None else str(each.op) for each in kept],
    }
