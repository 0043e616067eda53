import resource
import sys

import numpy as np
import psutil
import pytest

from rlhfbench.measure import host

MIB = 2**20


def test_resident_bytes_are_those_of_psutil():
    assert host.resident_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can reset the peak")
def test_the_peak_starts_again_at_the_reset():
    large = np.ones(200 * MIB, dtype=np.uint8)
    del large
    before = host.resident_bytes()
    assert host.peak_resident_bytes() >= before + 150 * MIB
    if not host.reset_peak():
        pytest.skip("this system does not permit the reset")
    assert host.peak_resident_bytes() < before + 50 * MIB
    large = np.ones(100 * MIB, dtype=np.uint8)
    del large
    assert before + 70 * MIB < host.peak_resident_bytes() < before + 150 * MIB


def test_without_proc_it_is_the_peak_of_the_whole_process(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "_STATUS", tmp_path / "absent")
    monkeypatch.setattr(host, "_CLEAR", tmp_path / "absent" / "absent")
    assert host.reset_peak() is False
    unit = 1 if sys.platform == "darwin" else 1024
    assert host.peak_resident_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
