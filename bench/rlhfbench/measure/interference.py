"""Interference: what else used the machine while a block was timed."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_STAT = Path("/proc/stat")
_PRESSURE = Path("/proc/pressure/cpu")
_CPUINFO = Path("/proc/cpuinfo")

# Shares of the machine's CPU time from which on a block counts as disturbed. A quiet machine of two cores shows 0.00 to
# 0.02 for other processes; one process that keeps one of two cores busy shows 0.3 to 0.5.
MAX_OTHER_CPU_SHARE = 0.1
MAX_STEAL_SHARE = 0.05
_POWER_CAP = "power cap"  # recorded, but no disturbance: a large GEMM alone reaches it


class Interference:
    """Observes the machine from its creation to ``take``, except between ``pause`` and ``resume``.

    Args:
        device: Device of the step. On CUDA its other processes and its throttling are read too.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._spent: dict[str, float] = {}
        self._started: dict[str, float] | None = None
        self.resume()

    def resume(self) -> None:
        """Goes on observing."""
        self._started = self._read()

    def pause(self) -> None:
        """Stops observing, while this process waits for its turn."""
        if self._started is None:
            return
        now = self._read()
        for name in now.keys() & self._started.keys():
            self._spent[name] = self._spent.get(name, 0.0) + now[name] - self._started[name]
        self._started = None

    @property
    def own_s(self) -> float:
        """CPU seconds of this process while it was observed, after ``pause``."""
        return self._spent.get("own_s", 0.0)

    def take(self, own_s: float | None = None) -> dict[str, Any]:
        """Returns what happened since the creation; ``None`` where the system does not tell.

        Args:
            own_s: CPU seconds of the case's processes on this machine, where it has several.

        Returns:
            ``other_cpu_share``: CPU time of other processes, as a share of all CPU time of the machine.
            ``steal_share``: CPU time that the hypervisor gave to others, as such a share.
            ``waiting_share``: Share of the time in which some runnable task waited for a CPU (Linux's pressure).
            ``involuntary_switches_per_s``: Times a second that this process was taken off a CPU.
            ``cpu_mhz``: Mean clock of the CPUs at the end.
            ``gpu_processes``: Other processes on the device; ``gpu_throttled``: why its clocks are held down.
        """
        self.pause()
        spent = self._spent
        wall_s = max(spent["wall_s"], 1e-9)
        cpu_s = wall_s * (os.cpu_count() or 1)
        other_s = spent["busy_s"] - (spent["own_s"] if own_s is None else own_s) if "busy_s" in spent else None
        return {
            "other_cpu_share": None if other_s is None else min(max(other_s / cpu_s, 0.0), 1.0),
            "steal_share": spent["steal_s"] / cpu_s if "steal_s" in spent else None,
            "waiting_share": min(spent["waiting_s"] / wall_s, 1.0) if "waiting_s" in spent else None,
            "involuntary_switches_per_s": spent["switches"] / wall_s,
            "cpu_mhz": _cpu_mhz(),
            **_gpu_state(self._device),
        }

    def _read(self) -> dict[str, float]:
        import resource  # here, as Windows has none and plans with this package

        usage = resource.getrusage(resource.RUSAGE_SELF)
        own = {"own_s": usage.ru_utime + usage.ru_stime, "switches": float(usage.ru_nivcsw)}
        return {"wall_s": time.perf_counter(), **own, **_machine_s()}


def disturbance(interference: Mapping[str, Any]) -> str | None:
    """Returns in a few words what disturbed a block; ``None`` if nothing did."""
    found = []
    if (interference.get("other_cpu_share") or 0) > MAX_OTHER_CPU_SHARE:
        found.append(f"other processes used {interference['other_cpu_share']:.0%} of the CPUs")
    if (interference.get("steal_share") or 0) > MAX_STEAL_SHARE:
        found.append(f"the hypervisor took {interference['steal_share']:.0%} of the CPUs")
    if interference.get("gpu_processes"):
        number = interference["gpu_processes"]
        found.append(f"{number} other {'process was' if number == 1 else 'processes were'} on the GPU")
    slowed = [why for why in (interference.get("gpu_throttled") or "").split(", ") if why not in ("", _POWER_CAP)]
    if slowed:
        found.append(f"the GPU's clocks were held down by {' and '.join(slowed)}")
    return ", ".join(found) or None


def _machine_s() -> dict[str, float]:
    """Seconds since boot: CPUs busy, stolen, and some task waiting. Linux only."""
    found: dict[str, float] = {}
    try:
        ticks = [int(word) for word in _STAT.read_text().split("\n", 1)[0].split()[1:]]
        user, nice, system, _, _, irq, softirq, steal = ticks[:8]
    except (OSError, ValueError):
        return found
    per_s = os.sysconf("SC_CLK_TCK")
    found = {"busy_s": (user + nice + system + irq + softirq) / per_s, "steal_s": steal / per_s}
    with suppress(OSError, ValueError, IndexError):  # kernels built without pressure stall information
        found["waiting_s"] = int(_PRESSURE.read_text().split("total=", 1)[1].split()[0]) * 1e-6
    return found


def _cpu_mhz() -> float | None:
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return None
    clocks = [float(line.rpartition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return sum(clocks) / len(clocks) if clocks else None


def _gpu_state(device: str) -> dict[str, Any]:
    """Other processes on a CUDA device, and why its clocks are held down; ``None`` on a CPU or without NVML."""
    kind, _, index = device.partition(":")
    state: dict[str, Any] = {"gpu_processes": None, "gpu_throttled": None}
    if kind != "cuda":
        return state
    from rlhfbench.measure.nvml import opened, running_processes

    with opened(int(index or 0)) as (nvml, handle):
        if nvml is None:
            return state
        reasons = {
            nvml.nvmlClocksThrottleReasonSwPowerCap: _POWER_CAP,
            nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "power brake",
            nvml.nvmlClocksThrottleReasonSwThermalSlowdown: "heat",
            nvml.nvmlClocksThrottleReasonHwThermalSlowdown: "heat",
        }
        processes = running_processes(nvml, handle)
        if processes is not None:
            # One of them is this process, which a container may know under another id.
            state["gpu_processes"] = max(len({process.pid for process in processes}) - 1, 0)
        try:
            held = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        except nvml.NVMLError:
            return state
        state["gpu_throttled"] = ", ".join(dict.fromkeys(name for bit, name in reasons.items() if held & bit))
    return state
