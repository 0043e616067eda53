"""The conditions under which recorded cases ran, compared with those of the present segment of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhfbench.records.derived import at
from rlhfbench.records.file import Entry
from rlhfbench.runs import environment
from rlhfbench.runs.folder import RunFolder, Segment


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
