import itertools
import time

import pytest
import torch

from rlhfbench.measure.clock import StepClock


@pytest.fixture
def now_ns(monkeypatch):
    """A clock that only the test moves."""
    now = [0]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    return now


def test_stretches_of_a_phase_add_up_and_time_between_phases_is_not_counted(now_ns):
    clock = StepClock()
    for _ in range(3):
        with clock.phase("a"):
            now_ns[0] += 2_000_000_000
        now_ns[0] += 500_000_000
        with clock.phase("b"):
            now_ns[0] += 100_000_000
    assert clock.take() == pytest.approx({"a": 6.0, "b": 0.3})
    assert clock.take() == {}
    assert clock.last_phase == "b"


def test_an_inner_phase_is_counted_once(now_ns):
    clock = StepClock()
    with clock.phase("outer"):
        now_ns[0] += 1_000_000_000
        with clock.phase("inner"):
            now_ns[0] += 10_000_000_000
        now_ns[0] += 2_000_000_000
    assert clock.take() == pytest.approx({"outer": 3.0, "inner": 10.0})


def test_a_cuda_clock_synchronizes_before_it_reads_the_time(monkeypatch):
    order = []
    ticks = itertools.count()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append(str(device)))
    monkeypatch.setattr(time, "perf_counter_ns", lambda: order.append("read") or next(ticks))
    clock = StepClock("cuda:0")
    with clock.phase("a"):
        order.append("work")
    assert order == ["cuda:0", "read", "work", "cuda:0", "read"]
