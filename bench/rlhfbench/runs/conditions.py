"""The conditions under which recorded cases ran, compared between the segments of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhfbench.records.derived import at
from rlhfbench.records.file import Entry
from rlhfbench.runs import environment
from rlhfbench.runs.folder import RunFolder, Segment

if TYPE_CHECKING:
    import pandas as pd


class Conditions:
    """Compares the machine of a recorded case as it was then and as it is now.

    Args:
        folder: has the environments of all segments.
        segment: the present segment; ``None`` for records of one start, which all have the same conditions.
    """

    def __init__(self, folder: RunFolder, segment: Segment | None) -> None:
        self._folder, self._segment = folder, segment
        self._are_alike: dict[tuple[int | None, str | None], bool] = {}  # by segment and host

    def are_alike(self, entry: Entry) -> bool:
        """True if times of the case of ``entry`` compare with times that its machine would have now.

        On a cluster, the environment of the machine must be recorded for the present segment.
        """
        if self._is_present(entry):
            return True
        key = at(entry.run, "segment"), entry.host
        if key not in self._are_alike:
            now, then = self._environments(entry)
            found = then is not None and environment.are_alike(
                environment.of_host(now, entry.host), environment.of_host(then, entry.host)
            )
            self._are_alike[key] = found
        return self._are_alike[key]

    def limit_is_same(self, entry: Entry) -> bool:
        """True if the case of ``entry`` might allocate as much as a case may now."""
        if self._is_present(entry):
            return True
        now, then = self._environments(entry)
        path = "settings.memory_limit_bytes"
        return then is not None and at(now, path) == at(then, path)

    def _is_present(self, entry: Entry) -> bool:
        return self._segment is None or entry.run == {**self._segment.to_dict(), "host": entry.host}

    def _environments(self, entry: Entry) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
        """The environments of the present segment and of that of ``entry``, ``None`` where it is not recorded."""
        *earlier, now = self._folder.environments()
        is_known = self._segment is not None and at(entry.run, "id") == self._segment.run_id
        return now, dict(enumerate(earlier)).get(at(entry.run, "segment")) if is_known else None


def with_conditions(frame: pd.DataFrame, environments: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """``frame`` with the columns of its conditions, if one machine measured cases of the run under unlike ones.

    Segments of a machine whose conditions are alike have the name of the first of them.

    Args:
        frame: a frame of ``records_frame``. Its hosts tell machines apart, also where they stand for several names.
        environments: of the segments of its run; one that is absent counts as the start's.
    """
    import pandas as pd

    from rlhfreports.columns import CONDITIONS, CONDITIONS_DIFFER, HOST, SEGMENT, START

    places = list(zip(frame[HOST].fillna(""), frame[SEGMENT].fillna(0), strict=True))
    found = {
        (host, segment): words
        for host in dict.fromkeys(host for host, _ in places)
        for segment, words in _of_machine(environments, host).items()
    }
    rows = [found.get(place, (START, "")) for place in places]
    each = zip(places, rows, frame["outcome"], strict=True)
    measured = {(host, name) for (host, _), (name, _), outcome in each if outcome == "ok"}
    if len(measured) == len({host for host, _ in measured}):
        return frame
    names, differences = zip(*rows, strict=True)
    return frame.assign(
        **{CONDITIONS: pd.array(names, dtype="string"), CONDITIONS_DIFFER: pd.array(differences, dtype="string")}
    )


def _of_machine(environments: Sequence[Mapping[str, Any]], host: str) -> dict[int, tuple[str, str]]:
    """The conditions of each segment on one machine: the name of the first that had them, and what differs in them."""
    from rlhfreports.columns import START

    first: dict[str, Mapping[str, Any]] = {}
    found: dict[int, tuple[str, str]] = {}
    for number, segment in enumerate(environments):
        present = environment.of_host(segment, host)
        name = next((name for name, earlier in first.items() if not _unlike(present, earlier)), None)
        if name is None:
            name = f"resumption {number}" if number else START
            first[name] = present
        found[number] = name, "" if name == START else ", ".join(_unlike(first[name], first[START]))
    return found


def _unlike(now: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[str]:
    """The differences between two environments of one machine, which may have several names."""
    return environment.unlike(now, earlier, without=("host",))
