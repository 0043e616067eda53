import sys
import threading
from types import SimpleNamespace

import pytest

from rlhfbench.measure.nvml import NvmlSampler

MIB = 2**20


class FakeNvml:
    """Stands in for pynvml; the test sets the readings."""

    class NVMLError(Exception):
        pass

    def __init__(self, fails_at=None):
        self.fails_at = fails_at
        self.used = 100 * MIB
        self.processes = []
        self.num_readings = 0
        self.read_again = threading.Event()
        self.was_shut_down = False

    def _may_fail(self, name):
        if self.fails_at == name:
            raise self.NVMLError(name)

    def nvmlInit(self):  # noqa: N802
        self._may_fail("init")

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        self._may_fail("handle")
        return f"device {index}"

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        assert handle == "device 1"
        self._may_fail("read")
        self.num_readings += 1
        if self.num_readings > 1:
            self.read_again.set()
        return SimpleNamespace(used=self.used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):  # noqa: N802
        return self.processes

    def nvmlShutdown(self):  # noqa: N802
        self.was_shut_down = True


@pytest.fixture
def nvml(monkeypatch):
    def put(fake):
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return put


def process(pid, used):
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


def test_the_peak_of_a_process(nvml):
    fake = nvml(FakeNvml())
    with NvmlSampler(1, interval_s=0.001) as sampler:
        fake.processes = [process(7, 300 * MIB), process(8, 900 * MIB)]
        assert fake.read_again.wait(10)
        fake.processes = [process(7, 200 * MIB)]
    assert sampler.available
    assert sampler.peak_bytes(7) in (300 * MIB, 200 * MIB)
    assert fake.was_shut_down


def test_the_largest_reading_counts(nvml):
    fake = nvml(FakeNvml())
    sampler = NvmlSampler(1, interval_s=1000)
    fake.processes = [process(7, 300 * MIB)]
    with sampler:  # one reading now, one at the end
        fake.processes = [process(7, 200 * MIB)]
    assert sampler.peak_bytes(7) == 300 * MIB


@pytest.mark.parametrize("processes", [[], [process(7, None)], [process(8, 10 * MIB)]])
def test_the_peak_of_an_unlisted_process_is_that_of_the_device_minus_its_start(nvml, processes):
    fake = nvml(FakeNvml())
    with NvmlSampler(1, interval_s=1000) as sampler:
        fake.processes, fake.used = processes, 350 * MIB
    assert sampler.peak_bytes(7) == 250 * MIB


@pytest.mark.parametrize("fails_at", ["init", "handle"])
def test_without_a_driver_or_a_device_the_peak_is_none(nvml, fails_at):
    nvml(FakeNvml(fails_at))
    with NvmlSampler(1) as sampler:
        pass
    assert not sampler.available
    assert sampler.peak_bytes(7) is None


def test_without_the_package_the_peak_is_none(nvml):
    nvml(None)  # importing it raises ImportError
    with NvmlSampler() as sampler:
        pass
    assert not sampler.available
    assert sampler.peak_bytes(7) is None


def test_a_device_that_stops_answering_is_no_error(nvml):
    fake = nvml(FakeNvml())
    fake.fails_at = "read"
    with NvmlSampler(1, interval_s=1000) as sampler:
        pass
    assert sampler.peak_bytes(7) is None


def test_before_the_block_the_peak_is_none(nvml):
    nvml(FakeNvml())
    assert NvmlSampler(1).peak_bytes(7) is None
