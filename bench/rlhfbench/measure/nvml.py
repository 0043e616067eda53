"""The driver's view of device memory, sampled from outside the measured process."""

from __future__ import annotations

import threading
from types import ModuleType, TracebackType
from typing import Any, Self


class NvmlSampler:
    """Reads the used memory of one device through NVML, in a thread, while it is entered.

    Where NVML is absent it does nothing and answers ``None``; ``available`` says so.

    Args:
        device_index: NVML's index of the device.
        interval_s: seconds between two readings: a shorter peak may be missed.
    """

    def __init__(self, device_index: int = 0, interval_s: float = 0.02) -> None:
        self._interval_s = interval_s
        self._nvml, self._handle = _open(device_index)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._used_at_start: int | None = None
        self._most_used: int | None = None
        self._most_by_pid: dict[int, int] = {}

    @property
    def available(self) -> bool:
        """Whether there are readings."""
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

    def peak_bytes(self, pid: int) -> int | None:
        """The most that process ``pid`` used of the device.

        Where the driver does not tell processes apart (in a container it may know them by other numbers): the most that
        the whole device used beyond what it used at the start. ``None`` without NVML.
        """
        if pid in self._most_by_pid:
            return self._most_by_pid[pid]
        if self._most_used is None or self._used_at_start is None:
            return None
        return max(self._most_used - self._used_at_start, 0)

    def _sample(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._read()

    def _read(self) -> int | None:
        """One reading; a device that stops answering gives none, and what was read before stays."""
        nvml: Any = self._nvml
        try:
            used = int(nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
            processes = nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except nvml.NVMLError:
            return None
        self._most_used = max(used, self._most_used or 0)
        for process in processes:
            if process.usedGpuMemory is not None:
                most = self._most_by_pid.get(process.pid, 0)
                self._most_by_pid[process.pid] = max(most, int(process.usedGpuMemory))
        return used


def _open(device_index: int) -> tuple[ModuleType | None, Any]:
    """NVML and the handle of a device, or ``None`` twice."""
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(device_index)
    except pynvml.NVMLError:
        return None, None
