import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from rlhfbench.measure import interference, nvml
from rlhfbench.measure.interference import Interference, disturbance

QUIET = {"other_cpu_share": 0.02, "steal_share": 0.0, "gpu_processes": None, "gpu_throttled": None}


@pytest.fixture
def machine(monkeypatch):
    """A machine of two CPUs whose clock and counters are those of the dictionary."""
    now = {"wall_s": 0.0, "own_s": 0.0, "switches": 0.0, "busy_s": 0.0, "steal_s": 0.0, "waiting_s": 0.0}
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(Interference, "_read", lambda self: dict(now))
    return now


def test_shares_are_of_all_cpus_without_this_process(machine):
    observed = Interference("cpu")
    machine.update(wall_s=10.0, own_s=12.0, busy_s=17.0, steal_s=1.0, waiting_s=4.0, switches=30.0)
    found = observed.take()
    assert found["other_cpu_share"] == pytest.approx(5 / 20)
    assert found["steal_share"] == pytest.approx(1 / 20)
    assert found["waiting_share"] == pytest.approx(0.4)
    assert found["involuntary_switches_per_s"] == 3.0
    assert (found["gpu_processes"], found["gpu_throttled"]) == (None, None)


def test_other_ranks_of_the_case_are_no_others(machine):
    observed = Interference("cpu")
    machine.update(wall_s=10.0, own_s=7.0, busy_s=17.0)
    observed.pause()
    assert observed.own_s == 7.0
    assert observed.take(own_s=7.0 + 8.0)["other_cpu_share"] == pytest.approx(2 / 20)


def test_what_happens_in_a_pause_does_not_count(machine):
    observed = Interference("cpu")
    machine.update(wall_s=1.0, own_s=1.0, busy_s=1.2)
    observed.pause()
    machine.update(wall_s=9.0, busy_s=17.0)
    observed.pause()
    observed.resume()
    machine.update(wall_s=10.0, own_s=2.0, busy_s=18.2)
    assert observed.take()["other_cpu_share"] == pytest.approx(0.4 / 4)


def test_a_clock_tick_too_few_is_no_negative_share(machine):
    observed = Interference("cpu")
    machine.update(wall_s=1.0, own_s=1.0, busy_s=0.99)
    assert observed.take()["other_cpu_share"] == 0.0


def test_a_system_without_counters_tells_nothing(monkeypatch, tmp_path):
    for name in ("_STAT", "_PRESSURE", "_CPUINFO"):
        monkeypatch.setattr(interference, name, tmp_path / "missing")
    found = Interference("cpu").take()
    assert [found[name] for name in ("other_cpu_share", "steal_share", "waiting_share", "cpu_mhz")] == [None] * 4
    assert disturbance(found) is None


def test_the_counters_of_linux(monkeypatch, tmp_path):
    stat, pressure = tmp_path / "stat", tmp_path / "cpu"
    stat.write_text("cpu  100 20 30 5000 7 1 2 40 0 0\ncpu0 1 2 3\n")
    pressure.write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=2500000\nfull avg10=0.00 total=0\n")
    monkeypatch.setattr(interference, "_STAT", stat)
    monkeypatch.setattr(interference, "_PRESSURE", pressure)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    assert interference._machine_s() == {"busy_s": 1.53, "steal_s": 0.4, "waiting_s": 2.5}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"other_cpu_share": 0.46}, "other processes used 46% of the CPUs"),
        ({"steal_share": 0.06}, "the hypervisor took 6% of the CPUs"),
        ({"steal_share": 0.04, "other_cpu_share": 0.09}, None),
        ({"gpu_processes": 1}, "1 other process was on the GPU"),
        ({"gpu_processes": 2}, "2 other processes were on the GPU"),
        ({"gpu_throttled": "power cap"}, None),
        ({"gpu_throttled": "power cap, heat"}, "the GPU's clocks were held down by heat"),
        ({"other_cpu_share": None, "steal_share": None}, None),
    ],
)
def test_what_counts_as_disturbed(change, says):
    assert disturbance({**QUIET, **change}) == says


def fake_nvml(pids, held):
    """NVML on whose one device ``pids`` run, with the throttle reasons ``held``."""
    names = ("SwPowerCap", "HwPowerBrakeSlowdown", "SwThermalSlowdown", "HwThermalSlowdown")
    return SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [SimpleNamespace(pid=pid) for pid in pids],
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: held,
        **{f"nvmlClocksThrottleReason{name}": bit for name, bit in zip(names, (4, 128, 32, 64), strict=True)},
    )


@pytest.mark.parametrize(("pids", "held", "found"), [([7], 0, (0, "")), ([7, 8], 4 | 32 | 64, (1, "power cap, heat"))])
def test_a_gpu_tells_of_its_processes_and_clocks(monkeypatch, pids, held, found):
    monkeypatch.setattr(nvml, "opened", lambda index: nullcontext((fake_nvml(pids, held), "handle")))
    state = interference._gpu_state("cuda:0")
    assert (state["gpu_processes"], state["gpu_throttled"]) == found


def test_a_gpu_that_does_not_list_its_processes_tells_of_its_clocks(monkeypatch):
    fake = fake_nvml([], 4)

    def fail(handle):
        raise fake.NVMLError

    fake.nvmlDeviceGetComputeRunningProcesses = fail
    monkeypatch.setattr(nvml, "opened", lambda index: nullcontext((fake, "handle")))
    assert interference._gpu_state("cuda") == {"gpu_processes": None, "gpu_throttled": "power cap"}
