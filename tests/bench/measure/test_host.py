import resource
import sys

import numpy as np
import psutil
import pytest

from rlhfbench.measure import host

MIB = 2**20


def test_the_peak_is_that_of_the_whole_process():
    before, resident = host.peak_resident_bytes(), psutil.Process().memory_info().rss
    large = np.ones(before - resident + 200 * MIB, dtype=np.uint8)
    del large
    assert host.peak_resident_bytes() >= before + 150 * MIB
    assert psutil.Process().memory_info().rss < resident + 50 * MIB


def test_without_proc_the_peak_is_that_of_getrusage(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "_STATUS", tmp_path / "absent")
    unit = 1 if sys.platform == "darwin" else 1024
    assert host.peak_resident_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """Makes control groups: ``make(line of /proc/self/cgroup, {folder: (limit, used, droppable)}, names)``."""
    monkeypatch.setattr(host, "_CGROUP_ROOT", tmp_path / "groups")
    monkeypatch.setattr(host, "_GROUPS", tmp_path / "cgroup")
    free = type("Memory", (), {"available": 100 * MIB})
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: free)

    def make(line, folders, names):
        (tmp_path / "cgroup").write_text(line)
        for folder, (limit, used, droppable) in folders.items():
            path = tmp_path / "groups" / folder
            path.mkdir(parents=True)
            (path / names[0]).write_text(f"{limit}\n")
            (path / names[1]).write_text(f"{used}\n")
            (path / "memory.stat").write_text(f"cache 5\n{names[2]} {droppable}\n")

    return make


def test_without_control_groups_all_of_the_machine_is_available(groups):
    assert host.available_bytes() == 100 * MIB


@pytest.mark.parametrize(
    ("line", "prefix", "names"), [("0::/a/b\n", "", V2), ("1:cpu:/\n4:memory:/a/b\n0::/\n", "memory/", V1)]
)
def test_available_memory_is_within_every_control_group_around_the_process(groups, line, prefix, names):
    """Pages of files that Linux drops when a group runs full are available."""
    outer, inner = (80 * MIB, 60 * MIB, 30 * MIB), (90 * MIB, 20 * MIB, 0)
    groups(line, {f"{prefix}a": outer, f"{prefix}a/b": inner}, names)
    assert host.available_bytes() == 50 * MIB


def test_a_group_without_a_limit_bounds_nothing(groups):
    groups("0::/a\n", {"a": ("max", 60 * MIB, 0)}, V2)
    assert host.available_bytes() == 100 * MIB


def test_a_full_group_leaves_nothing(groups):
    groups("0::/\n", {"": (10 * MIB, 11 * MIB, 0)}, V2)
    assert host.available_bytes() == 0
