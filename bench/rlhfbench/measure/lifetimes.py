"""Lifetimes of storages, and the choice of those that a timeline names."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from rlhfbench.measure.tally import Origin, Storage, Tally
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


class ReplayedTally(Tally):
    """A tally for ``replay`` that tells of lifetimes as a ledger does.

    A recording knows no storages. What ends is taken for the youngest storage of the same part, size, shape, dtype and
    op: equal storages are mostly freed in the reverse of the order in which they were made, and they have one name.

    Args:
        on_change: As in ``Tally``.
        on_lifetime: Called when a storage is freed or moved, and by ``end`` for all that live.
    """

    def __init__(self, on_change: Callable[[Sequence[int]], None], on_lifetime: Callable[[Lifetime], None]) -> None:
        super().__init__(on_change)
        self._on_lifetime = on_lifetime
        # By part and size: its origin, the event at which it was made, and that at which it came to the part.
        self._live: dict[tuple[int, int], list[tuple[Origin, int, int]]] = collections.defaultdict(list)

    def grow(self, part: int, num_bytes: int, storage: Storage | None = None) -> None:
        """See ``Tally.grow``."""
        super().grow(part, num_bytes, storage)
        if isinstance(storage, Origin) and num_bytes > 0:
            self._live[part, num_bytes].append((storage, self.num_changes, self.num_changes))
        elif isinstance(storage, Origin) and num_bytes < 0:
            self._ended(part, -num_bytes, storage)

    def move(self, num_bytes: int, origin: int, part: int, storage: Storage | None = None) -> None:
        """See ``Tally.move``."""
        super().move(num_bytes, origin, part, storage)
        if isinstance(storage, Origin) and num_bytes > 0:
            born = self._ended(origin, num_bytes, storage)
            self._live[part, num_bytes].append((storage, born, self.num_changes))

    def end(self) -> None:
        """Ends the lifetimes of all storages that live."""
        for (part, num_bytes), storages in self._live.items():
            for origin, born, since in storages:
                self._tell(part, num_bytes, origin, born, since, self.num_changes + 1)
        self._live.clear()

    def _ended(self, part: int, num_bytes: int, storage: Origin) -> int:
        """Ends the lifetime of a storage and returns when it was made."""
        same = self._live[part, num_bytes]
        if not same:
            return self.num_changes
        origin, born, since = same.pop(_youngest(same, storage))
        self._tell(part, num_bytes, origin, born, since, self.num_changes)
        return born

    def _tell(self, part: int, num_bytes: int, origin: Origin, born: int, since: int, end: int) -> None:
        self._on_lifetime(Lifetime(part, num_bytes, born, since, end, origin.shape, origin.dtype, origin.op))


def _youngest(live: Sequence[tuple[Origin, int, int]], storage: Origin) -> int:
    """The place of the last one that is ``storage``, else that has its shape and dtype, else of the last.

    Optimizer steps are recorded apart from what made the gradients that they free, so these have no op.
    """
    for known in (3, 2):  # fields of an origin
        for place in reversed(range(len(live))):
            if live[place][0][:known] == storage[:known]:
                return place
    return len(live) - 1
