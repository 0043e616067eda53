import sys
import threading
from types import SimpleNamespace

import pytest

from rlhfbench.measure.nvml import NvmlSampler, device_bytes, num_cuda_devices

MIB = 2**20


class NVMLError(Exception):
    pass


class NoPermissionError(NVMLError):
    pass


class FakeNvml:
    """Stands in for pynvml; the test sets the readings."""

    NVMLError, NVMLError_NoPermission = NVMLError, NoPermissionError

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

    def nvmlDeviceGetCount(self):  # noqa: N802
        return 2

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle, index):  # noqa: N802
        raise self.NVMLError("not divided")

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
        self._may_fail("processes")
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


def test_readings_before_a_restart_do_not_count(nvml):
    fake = nvml(FakeNvml())
    sampler = NvmlSampler(1, interval_s=1000)
    fake.processes = [process(7, 900 * MIB)]
    with sampler:
        sampler.restart()
        fake.processes = [process(7, 200 * MIB)]
    assert sampler.peak_bytes(7) == 200 * MIB


@pytest.mark.parametrize("processes", [[], [process(7, None)], [process(8, 10 * MIB)]])
def test_the_peak_of_an_unlisted_process_is_that_of_the_device_minus_its_start(nvml, processes):
    fake = nvml(FakeNvml())
    with NvmlSampler(1, interval_s=1000) as sampler:
        fake.processes, fake.used = processes, 350 * MIB
    assert sampler.peak_bytes(7) == 250 * MIB


def test_without_a_list_of_processes_the_peak_is_that_of_the_device(nvml):
    fake = nvml(FakeNvml(fails_at="processes"))
    with NvmlSampler(1, interval_s=1000) as sampler:
        fake.used = 350 * MIB
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


class FourGpus:
    """Stands in for pynvml on a machine of four devices, whose memory tells them apart."""

    NVMLError, NVMLError_NoPermission = NVMLError, NoPermissionError
    UUIDS = ("GPU-aa11", "GPU-aa22", "GPU-bb33", "GPU-cc44")

    def __init__(self, kept=(), divided=()):
        self.kept, self.divided = kept, divided

    def nvmlInit(self):  # noqa: N802
        pass

    def nvmlShutdown(self):  # noqa: N802
        pass

    def nvmlDeviceGetCount(self):  # noqa: N802
        return 4

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        if index in self.kept:
            raise self.NVMLError_NoPermission
        return index

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle, index):  # noqa: N802
        if handle not in self.divided:
            raise self.NVMLError
        return 10 * (handle + 1) + index

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        assert uuid == "MIG-1"
        return 9

    def nvmlDeviceGetUUID(self, handle):  # noqa: N802
        return self.UUIDS[handle].encode() if handle else self.UUIDS[handle]

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        return SimpleNamespace(total=handle + 1, used=handle + 1)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):  # noqa: N802
        return [process(7, handle + 1)]


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        (None, [0, 1, 2, 3]),
        ("2", [2]),
        ("3,1", [3, 1]),
        (" 3 , 0 ", [3, 0]),
        ("GPU-bb33,GPU-aa1", [2, 0]),
        ("1,GPU-cc44", [1, 3]),
        ("GPU-aa", []),  # two devices begin so
        ("0,9,1", [0]),  # what follows a wrong entry is ignored
        ("0,-1,1", [0]),
        ("0,0", []),
        ("", []),
        ("NoDevFiles", []),
        ("9" * 5000, []),
        ("MIG-1,2", [9, 2]),
    ],
)
def test_cuda_visible_devices_maps_to_the_devices_of_the_driver_everywhere(nvml, monkeypatch, visible, devices):
    nvml(FourGpus())
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert num_cuda_devices() == len(devices)
    memory = [device + 1 for device in devices]
    assert [device_bytes(f"cuda:{index}") for index in range(4)] == memory + [None] * (4 - len(memory))
    for index in range(4):
        with NvmlSampler(index, interval_s=1000) as sampler:
            pass
        assert sampler.available == (index < len(devices))
        assert sampler.peak_bytes(7) == (memory[index] if index < len(memory) else None)


@pytest.mark.parametrize(("visible", "devices"), [(None, [1, 3]), ("1", [3]), ("GPU-cc44,GPU-aa22", [3, 1])])
def test_a_device_that_this_process_may_not_use_is_not_counted(nvml, monkeypatch, visible, devices):
    nvml(FourGpus(kept=(0, 2)))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert num_cuda_devices() == len(devices)
    assert [device_bytes(f"cuda:{index}") for index in range(len(devices))] == [device + 1 for device in devices]


def test_the_memory_of_a_divided_device_is_that_of_its_first_instance(nvml):
    nvml(FourGpus(divided=(0,)))
    assert [device_bytes(device) for device in ("cuda", "cuda:1")] == [11, 2]


def test_a_driver_that_fails_has_no_devices(nvml):
    fake = nvml(FourGpus())
    fake.nvmlDeviceGetCount = _fails
    assert num_cuda_devices() == 0
    assert device_bytes("cuda") is None


def _fails(*arguments):
    raise NVMLError


def test_without_nvml_the_files_of_the_driver_are_counted(nvml, monkeypatch, tmp_path):
    nvml(None)
    monkeypatch.setattr("rlhfbench.measure.nvml._DRIVER_GPUS", tmp_path / "gpus")
    assert num_cuda_devices() == 0
    for index, uuid in enumerate(FourGpus.UUIDS):
        (tmp_path / "gpus" / f"0000:0{index}").mkdir(parents=True)
        (tmp_path / "gpus" / f"0000:0{index}" / "information").write_text(f"Model: X\nGPU UUID: \t {uuid}\n")
    assert num_cuda_devices() == 4
    for visible, number in (("3,0", 2), ("GPU-cc44,GPU-zz", 1), ("", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert num_cuda_devices() == number
