import resource
import sys

import numpy as np
import psutil
import pytest

from rlhfbench.measure import host

MIB = 2**20


def test_resident_bytes_are_those_of_psutil():
    assert host.resident_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)


def test_the_peak_is_that_of_the_whole_process():
    before = host.resident_bytes()
    large = np.ones(200 * MIB, dtype=np.uint8)
    del large
    assert host.peak_resident_bytes() >= before + 150 * MIB
    assert host.resident_bytes() < before + 50 * MIB


def test_without_proc_the_peak_is_that_of_getrusage(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "_STATUS", tmp_path / "absent")
    unit = 1 if sys.platform == "darwin" else 1024
    assert host.peak_resident_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
