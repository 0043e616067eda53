"""Host memory: the resident set of this process, its peak, and what is available to it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_GROUPS = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")
# Files of a control group by version: the limit, the use, and the key in memory.stat of file pages that Linux drops
# when a group runs full.
_GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def peak_resident_bytes() -> int:
    """Returns the largest resident set since this process began."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource  # here, as Windows has none and plans with this package

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int:
    """Returns the memory that is available without swapping, within the limits of this process's control groups."""
    return max(0, min((int(psutil.virtual_memory().available), *_left_in_groups())))


def _left_in_groups() -> Iterator[int]:
    """The bytes left in each control group of memory that this process is in, outer ones included."""
    for version, folder in _group_folders():
        limit_name, used_name, droppable = _GROUP_FILES[version]
        try:
            limit, used = ((folder / name).read_text().strip() for name in (limit_name, used_name))
            stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group here, as inside a container
            continue
        if limit != "max":
            yield int(limit) - int(used) + int(stats.get(droppable, 0))


def _group_folders() -> Iterator[tuple[int, Path]]:
    """(version, folder) of every control group of memory of this process, from its own up to the root."""
    try:
        lines = _GROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, root = (1, _CGROUP_ROOT / "memory") if controllers else (2, _CGROUP_ROOT)
        folder = root / path.strip("/")
        yield version, folder
        while folder != root:
            folder = folder.parent
            yield version, folder
