"""The driver's view of the devices: which of them CUDA sees, and their memory, sampled from outside a process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")


def visible_devices(num_devices: int, uuids: Callable[[], Sequence[str]]) -> list[int | str]:
    """The devices that CUDA sees, in its order, under ``CUDA_VISIBLE_DEVICES``.

    As in CUDA, the first entry that names no device ends the list, and a device that is named twice empties it. NVML
    orders devices by PCI bus. So does CUDA where they are alike, or where ``CUDA_DEVICE_ORDER`` says so.

    Args:
        num_devices: devices of the machine.
        uuids: called for the UUID of each device, ``GPU-…``, if the variable has any.

    Returns:
        The driver's index of each, or the UUID of a MIG device.
    """
    value = os.environ.get(_VISIBLE)
    if value is None:
        return list(range(num_devices))
    found: list[int | str] = []
    for entry in map(str.strip, value.split(",")):
        if entry.startswith("MIG-"):
            found.append(entry)
            continue
        if entry.startswith("GPU-"):
            matches = [index for index, uuid in enumerate(uuids()) if uuid.startswith(entry)]
        else:
            matches = [index for index in range(num_devices) if entry == str(index)]
        if len(matches) != 1:
            break
        found.append(matches[0])
    return found if len(set(found)) == len(found) else []


def num_cuda_devices() -> int:
    """Number of devices that CUDA sees under ``CUDA_VISIBLE_DEVICES``, according to the driver, without torch."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # NVML fails in many ways; Linux lists the devices here too
        files = sorted(_DRIVER_GPUS.glob("*/information"))
        return len(visible_devices(len(files), lambda: [_driver_uuid(file) for file in files]))
    try:
        return len(visible_handles(pynvml))
    except pynvml.NVMLError:
        return 0
    finally:
        pynvml.nvmlShutdown()


def _driver_uuid(information: Path) -> str:
    """The UUID in a device's file of the driver."""
    lines = information.read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("GPU UUID")), "")


def device_handle(nvml: Any, index: int) -> Any:
    """NVML's handle of CUDA's device ``index``; ``None`` if CUDA sees no such device.

    Raises:
        NVMLError: the driver fails.
    """
    devices = visible_handles(nvml)
    return devices[index] if index < len(devices) else None


def device_bytes(device: str) -> int | None:
    """The whole memory of a CUDA device as the driver states it; ``None`` without a driver.

    Args:
        device: ``cuda`` or ``cuda:N``.
    """
    with opened(int(device.partition(":")[2] or 0)) as (nvml, handle):
        if nvml is None:
            return None
        try:
            return int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
        except nvml.NVMLError:
            return None


def visible_handles(nvml: Any) -> list[Any]:
    """Handles of the devices that CUDA sees, in its order.

    Of a device that is divided (MIG) it is the handle of the first instance, which CUDA takes.

    Raises:
        NVMLError: the driver fails.
    """
    handles = _usable_handles(nvml)

    def uuids() -> list[str]:
        return [
            uuid.decode() if isinstance(uuid, bytes) else str(uuid) for uuid in map(nvml.nvmlDeviceGetUUID, handles)
        ]

    return [
        nvml.nvmlDeviceGetHandleByUUID(device) if isinstance(device, str) else _undivided(nvml, handles[device])
        for device in visible_devices(len(handles), uuids)
    ]


def _usable_handles(nvml: Any) -> list[Any]:
    """Handles of the devices that this process may use. NVML counts those of others too, and CUDA does not."""
    handles = []
    for index in range(int(nvml.nvmlDeviceGetCount())):
        with suppress(nvml.NVMLError_NoPermission):
            handles.append(nvml.nvmlDeviceGetHandleByIndex(index))
    return handles


def _undivided(nvml: Any, handle: Any) -> Any:
    """The first instance of a divided device, else the device itself."""
    try:
        return nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, 0)
    except nvml.NVMLError:
        return handle


class NvmlSampler:
    """Samples the used memory of one device through NVML, in a thread, inside a ``with`` block.

    Without NVML it does nothing and its peaks are ``None``.

    Args:
        device_index: CUDA's index of the device.
        interval_s: Seconds between two readings. A shorter peak may be missed.
    """

    def __init__(self, device_index: int = 0, interval_s: float = 0.02) -> None:
        self._interval_s = interval_s
        self._nvml, self._handle = _open(device_index)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._used_at_start: int | None = None
        self._peak_used: int | None = None
        self._peak_by_pid: dict[int, int] = {}

    @property
    def available(self) -> bool:
        """``True`` if NVML can be read."""
        return self._nvml is not None

    def __enter__(self) -> Self:
        if self.available:
            self._used_at_start = self._read()
            self._thread = threading.Thread(target=self._sample, name="nvml", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None and self._nvml is not None:
            self._thread.join()
            self._read()
            self._nvml.nvmlShutdown()

    def restart(self) -> None:
        """Forgets the readings so far; the device's use at the start stays."""
        self._peak_used, self._peak_by_pid = None, {}

    def peak_bytes(self, pid: int) -> int | None:
        """Returns the peak device memory of process ``pid``, or ``None`` without NVML.

        If the driver does not list ``pid`` (in a container it may see other process ids), the result is the peak of the
        whole device minus its use at the start.
        """
        if pid in self._peak_by_pid:
            return self._peak_by_pid[pid]
        if self._peak_used is None or self._used_at_start is None:
            return None
        return max(self._peak_used - self._used_at_start, 0)

    def _sample(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._read()

    def _read(self) -> int | None:
        """Takes one reading. A device that stops answering gives ``None``; earlier readings are kept."""
        nvml: Any = self._nvml
        try:
            used = int(nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        except nvml.NVMLError:
            return None
        self._peak_used = max(used, self._peak_used or 0)
        for process in running_processes(nvml, self._handle) or ():
            if process.usedGpuMemory is not None:
                peak = self._peak_by_pid.get(process.pid, 0)
                self._peak_by_pid[process.pid] = max(peak, int(process.usedGpuMemory))
        return used


def running_processes(nvml: Any, handle: Any) -> Sequence[Any] | None:
    """The processes that compute on a device; ``None`` where the driver does not tell, as for a virtual GPU."""
    try:
        found: Sequence[Any] = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:
        return None
    return found


@contextmanager
def opened(device_index: int) -> Iterator[tuple[ModuleType | None, Any]]:
    """Yields NVML and the handle of CUDA's device ``device_index``, or ``None`` twice when unavailable."""
    nvml, handle = _open(device_index)
    try:
        yield nvml, handle
    finally:
        if nvml is not None:
            nvml.nvmlShutdown()


def _open(device_index: int) -> tuple[ModuleType | None, Any]:
    """Returns NVML and the device's handle, or ``None`` twice when unavailable."""
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        handle = device_handle(pynvml, device_index)
    except pynvml.NVMLError:
        return None, None
    return (None, None) if handle is None else (pynvml, handle)
