"""Timeline of a step: live bytes by part over the step's events, of bounded size for a step of any length.

An event is one change in the ledger: a storage added, resized, moved to another part or freed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rlhfbench.measure.lifetimes import Lifetime, largest, lifetime_columns
from rlhfbench.measure.tally import Snapshot
from rlhfkernels.observer import PARTS, Observer

# A plot 1000 pixels wide shows no more points. Their JSON stays below 200 kB for sizes up to a petabyte.
MAX_POINTS = 512
MAX_STRETCHES = 128
# Lifetimes kept beyond those that a point shows, before they are looked through again: 200 kB, which the resident set
# of the process cannot tell.
_ROOM = 1024

_Point = tuple[int, int, list[int]]  # event, total, bytes by part


@dataclasses.dataclass(kw_only=True, slots=True)
class _Stretch:
    """The events between two phase boundaries.

    Attributes:
        phases: Names of the phases: one; none outside phases; several after stretches were joined.
        first_event: Last event before the stretch.
        last_event: Last event of the stretch so far.
        width: Number of consecutive events that share one point.
        points: The moment with the highest total of each ``width`` events.
    """

    phases: list[str]
    first_event: int
    last_event: int
    width: int = 1
    points: list[_Point] = dataclasses.field(default_factory=list)

    def coarsen(self) -> None:
        """Halves the number of points: of every two, keeps the one with the higher total, the first of equals."""
        self.width *= 2
        pairs = (self.points[i : i + 2] for i in range(0, len(self.points), 2))
        self.points = [max(pair, key=lambda point: point[1]) for pair in pairs]

    def joined(self, after: _Stretch) -> _Stretch:
        """Returns this stretch and the next one, ``after``, as a single stretch."""
        return _Stretch(
            phases=list(dict.fromkeys([*self.phases, *after.phases])),
            first_event=self.first_event,
            last_event=after.last_event,
            width=max(self.width, after.width),
            points=self.points + after.points,
        )


class Timeline(Observer):
    """Records the highest moment of every few consecutive events, and every phase boundary.

    It begins with one point per event. At ``max_points``, the stretch with the most points drops half of them, so that
    a long phase costs the short ones no resolution. Only a step with more than ``max_stretches`` stretches loses
    boundaries: neighbouring stretches are then joined in pairs.

    Of every part it names the largest storages at each point. A storage between two points is forgotten, so that a long
    step takes no more memory than a short one.

    Pass ``note`` to the ledger as ``on_change``, ``note_lifetime`` as ``on_lifetime``, and the timeline to the step as
    an observer after the ledger.

    Args:
        max_points: Maximum number of points; more than ``max_stretches``.
        max_stretches: Maximum number of stretches; at least 2.
    """

    def __init__(self, max_points: int = MAX_POINTS, max_stretches: int = MAX_STRETCHES) -> None:
        self._max_points, self._max_stretches = max_points, max_stretches
        self._num_events = self._num_points = 0
        self._room = 0  # events that the last point can still cover
        self._highest = 0  # total of the last point
        self._lifetimes: list[Lifetime] = []
        self._max_lifetimes = _ROOM
        self._names: list[str] = []
        self._stretches = [_Stretch(phases=[], first_event=0, last_event=0)]

    def note(self, parts: Sequence[int]) -> None:
        """Records one event.

        Args:
            parts: Live bytes by part after the event, in the order of ``PARTS``.
        """
        self._num_events += 1
        total = sum(parts)
        points = self._stretches[-1].points
        if self._room == 0:
            if self._num_points >= self._max_points:
                self._coarsen()
                points = self._stretches[-1].points
            self._room = self._stretches[-1].width
            self._num_points += 1
        elif total > self._highest:
            points.pop()
        else:
            self._room -= 1
            return
        self._room -= 1
        self._highest = total
        points.append((self._num_events, total, list(parts)))

    def note_lifetime(self, lifetime: Lifetime) -> None:
        """Records a storage's stretch of events. It has ended, so no point to come is in it."""
        self._lifetimes.append(lifetime)
        if len(self._lifetimes) > self._max_lifetimes:
            events = [event for stretch in self._stretches for event, _, _ in stretch.points]
            self._lifetimes = largest(self._lifetimes, events)
            self._max_lifetimes = 2 * len(self._lifetimes) + _ROOM

    def enter_phase(self, name: str) -> None:
        """Begins a stretch of phase ``name``. An enclosing phase's stretch ends here."""
        self._names.append(name)
        self._begin_stretch()

    def exit_phase(self, name: str) -> None:
        """Ends the stretch. An enclosing phase continues in a new one."""
        self._names.pop()
        self._begin_stretch()

    def to_dict(self, peaks: Mapping[str, Snapshot]) -> dict[str, Any]:
        """Returns the timeline as a JSON object.

        Args:
            peaks: The ledger's peaks by phase. Each becomes a point, even if a moment with the same total was kept.

        Returns:
            ``num_events``. ``phases``: a list of objects with ``names`` (one, unless stretches were joined),
            ``first_event``, ``last_event`` and ``events_per_point``. ``peak``: its ``event``, ``phase`` and
            ``total_bytes``. The points in their order, as columns: ``events`` and, by part, ``parts_bytes``. The
            largest storages at these points, as columns: ``tensors``, see ``lifetime_columns``.
        """
        points = {event: parts for stretch in self._stretches for event, _, parts in stretch.points}
        points |= {peak.event: [peak.parts[part] for part in PARTS] for peak in peaks.values()}
        events = sorted(points)
        highest = max(peaks, key=lambda name: peaks[name].total_bytes)
        self._stretches[-1].last_event = self._num_events
        return {
            "num_events": self._num_events,
            "phases": [
                {
                    "names": stretch.phases,
                    "first_event": stretch.first_event,
                    "last_event": stretch.last_event,
                    "events_per_point": stretch.width,
                }
                for stretch in self._stretches
                if stretch.phases
            ],
            "peak": {"event": peaks[highest].event, "phase": highest, "total_bytes": peaks[highest].total_bytes},
            "events": events,
            "parts_bytes": {part: [points[event][i] for event in events] for i, part in enumerate(PARTS)},
            "tensors": lifetime_columns(self._lifetimes, events),
        }

    def _begin_stretch(self) -> None:
        last, now = self._stretches[-1], self._num_events
        last.last_event = now
        if last.first_event == now and not last.points and not last.phases:
            self._stretches.pop()  # no event between two phases
        if len(self._stretches) >= self._max_stretches:
            pairs = (self._stretches[i : i + 2] for i in range(0, len(self._stretches), 2))
            self._stretches = [pair[0].joined(pair[1]) if len(pair) == 2 else pair[0] for pair in pairs]
        self._stretches.append(_Stretch(phases=self._names[-1:], first_event=now, last_event=now))
        self._room = 0

    def _coarsen(self) -> None:
        largest = max(self._stretches, key=lambda stretch: len(stretch.points))
        before = len(largest.points)
        largest.coarsen()
        self._num_points -= before - len(largest.points)
