"""The arithmetic of the ledger: live bytes by part, the peak of each phase, the largest tensor.

A tally knows sizes and no tensors, so that a recording of a ledger's changes can be replayed without any.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from rlhfkernels.observer import PARTS, Observer

MODEL_PARTS = ("base", "adapters", "heads", "gradients", "optimizer")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The live bytes at one moment; the parts sum exactly to the total.

    Attributes:
        total_bytes: All live bytes.
        parts: Live bytes by part; every part of ``PARTS`` is there.
        event: Number of changes that the ledger had counted by then: the moment's position in a timeline.
    """

    total_bytes: int
    parts: dict[str, int]
    event: int = dataclasses.field(default=0, compare=False)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LargestTensor:
    """The largest single storage, with the shape of the first tensor on it and the op that made that tensor.

    ``op`` is ``None`` if the storage existed before the ledger saw it.
    """

    num_bytes: int
    shape: tuple[int, ...]
    op: str | None


class Storage(Protocol):
    """A storage that a ledger counts: shape and dtype of the first tensor on it, and the op that made that tensor."""

    shape: torch.Size
    dtype: torch.dtype
    op: Any


class Origin(NamedTuple):
    """A recorded ``Storage``."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    op: Any


class Peak:
    """The highest total of a stretch of time, with the parts at that moment."""

    __slots__ = ("event", "parts", "total")

    def __init__(self) -> None:
        self.total = 0
        self.parts = [0] * len(PARTS)
        self.event = 0

    def take(self, total: int, parts: list[int], event: int) -> None:
        """Makes a moment the peak."""
        self.total, self.parts, self.event = total, parts.copy(), event

    def snapshot(self) -> Snapshot:
        """Returns the peak so far."""
        parts = dict(zip(PARTS, self.parts, strict=True))
        return Snapshot(total_bytes=self.total, parts=parts, event=self.event)


class Tally:
    """Sums of a ledger. Parts are given by their index in ``PARTS``.

    Args:
        on_change: Called after every change with the live bytes by part, in the order of ``PARTS``. The list is the
            tally's own: copy it to keep it.

    Attributes:
        parts: Live bytes by part.
        total: Live bytes.
        num_changes: Number of changes so far.
        outside: The peak outside phases.
        in_phases: The peak of each phase, over all its stretches.
        largest: The largest storage that was given to ``consider_largest``.
    """

    def __init__(self, on_change: Callable[[Sequence[int]], None] | None = None) -> None:
        self._on_change = on_change
        self._phases: list[str] = []
        self.parts = [0] * len(PARTS)
        self.total = self.num_changes = 0
        self.outside = self._peak = Peak()
        self.in_phases: dict[str, Peak] = {}
        self.largest: LargestTensor | None = None

    def enter_phase(self, name: str) -> None:
        """Starts a stretch of phase ``name``; an enclosing phase pauses meanwhile."""
        self._phases.append(name)
        self._point_peak()

    def exit_phase(self, name: str) -> None:
        """Ends the stretch."""
        assert self._phases[-1:] == [name], f"phase {name} ends inside {self._phases}"
        self._phases.pop()
        self._point_peak()

    def grow(self, part: int, num_bytes: int, storage: Storage | None = None) -> None:
        """Adds ``num_bytes`` of ``storage`` to ``part``; a negative number frees them."""
        self.parts[part] += num_bytes
        self.total += num_bytes
        if self.total > self._peak.total:
            self._peak.take(self.total, self.parts, self.num_changes + 1)
        self._changed()

    def move(self, num_bytes: int, origin: int, part: int, storage: Storage | None = None) -> None:
        """Moves ``num_bytes`` of ``storage`` from part ``origin`` to ``part``."""
        self.parts[origin] -= num_bytes
        self.parts[part] += num_bytes
        self._changed()

    def add_phases(self, earlier: Tally) -> None:
        """Adds the phases of a tally that ended before this one began, and its largest storage."""
        self.in_phases = earlier.in_phases | self.in_phases
        largest = [each for each in (earlier.largest, self.largest) if each is not None]
        self.largest = max(largest, key=lambda each: each.num_bytes, default=None)

    def refresh_peak(self) -> None:
        """Takes the peak's parts again: a tensor is named just after it was made, perhaps after it made the peak."""
        if self.total == self._peak.total:
            self._peak.take(self.total, self.parts, self.num_changes)

    def consider_largest(self, num_bytes: int, shape: tuple[int, ...], op: Hashable) -> None:
        """Compares a storage that is no model part with the largest so far, the first of equals."""
        if self.largest is None or num_bytes > self.largest.num_bytes:
            name = None if op is None else str(op)
            self.largest = LargestTensor(num_bytes=num_bytes, shape=tuple(shape), op=name)

    @property
    def peaks(self) -> dict[str, Snapshot]:
        """The highest moment of each phase."""
        return {name: peak.snapshot() for name, peak in self.in_phases.items()}

    @property
    def peak(self) -> Snapshot:
        """The highest moment, inside phases and outside."""
        return max((self.outside, *self.in_phases.values()), key=lambda peak: peak.total).snapshot()

    @property
    def peak_phase(self) -> str | None:
        """The phase with the highest total, the first of equals; ``None`` before the first phase."""
        return max(self.in_phases, key=lambda name: self.in_phases[name].total, default=None)

    def _changed(self) -> None:
        self.num_changes += 1
        if self._on_change is not None:
            self._on_change(self.parts)

    def _point_peak(self) -> None:
        """Makes the innermost phase's peak the current one, starting from what lives now."""
        self._peak = self.in_phases.setdefault(self._phases[-1], Peak()) if self._phases else self.outside
        if self.total > self._peak.total:
            self._peak.take(self.total, self.parts, self.num_changes)


# One call of a tally: the method's name and its arguments.
Change = tuple[Any, ...]
PHASE_CHANGES = ("enter_phase", "exit_phase")


class Recorder(Tally):
    """A tally that keeps every call, in order, for ``replay``.

    Attributes:
        changes: The calls so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[Change] = []

    def enter_phase(self, name: str) -> None:
        """See ``Tally.enter_phase``."""
        self.changes.append(("enter_phase", name))
        super().enter_phase(name)

    def exit_phase(self, name: str) -> None:
        """See ``Tally.exit_phase``."""
        self.changes.append(("exit_phase", name))
        super().exit_phase(name)

    def grow(self, part: int, num_bytes: int, storage: Storage | None = None) -> None:
        """See ``Tally.grow``."""
        self.changes.append(("grow", part, num_bytes, _origin_of(storage)))
        super().grow(part, num_bytes)

    def move(self, num_bytes: int, origin: int, part: int, storage: Storage | None = None) -> None:
        """See ``Tally.move``."""
        self.changes.append(("move", num_bytes, origin, part, _origin_of(storage)))
        super().move(num_bytes, origin, part)

    def refresh_peak(self) -> None:
        """See ``Tally.refresh_peak``."""
        self.changes.append(("refresh_peak",))
        super().refresh_peak()

    def consider_largest(self, num_bytes: int, shape: tuple[int, ...], op: Hashable) -> None:
        """See ``Tally.consider_largest``."""
        self.changes.append(("consider_largest", num_bytes, shape, op))
        super().consider_largest(num_bytes, shape, op)


def unnamed(changes: Iterable[Change]) -> list[Change]:
    """Recorded calls without their storages."""
    return [tuple(each for each in change if not isinstance(each, Origin)) for change in changes]


def _origin_of(storage: Storage | None) -> Origin | None:
    return None if storage is None else Origin(tuple(storage.shape), storage.dtype, storage.op)


def replay(changes: Iterable[Change], tally: Tally, observer: Observer) -> None:
    """Makes recorded calls again.

    Args:
        changes: Of a ``Recorder``.
        tally: Receives the calls.
        observer: Told of phases, each time after ``tally``.
    """
    for name, *arguments in changes:
        getattr(tally, name)(*arguments)
        if name in PHASE_CHANGES:
            getattr(observer, name)(*arguments)
