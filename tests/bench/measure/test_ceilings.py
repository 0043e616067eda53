import itertools
import time

import pytest
import torch

from rlhfbench.measure import ceilings
from rlhfbench.measure.ceilings import measure_ceilings


@pytest.fixture
def seconds(monkeypatch):
    """Every reading of the clock is one second later, so that everything takes exactly one second."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rates_are_work_over_time(seconds, monkeypatch, dtype):
    monkeypatch.setitem(ceilings._BUFFER_BYTES, "cpu", 1000)
    assert measure_ceilings("cpu", dtype) == {
        "matmul_flops_per_s": 2 * 256**3,  # a product of one second is long: no larger one is tried
        "copy_bytes_per_s": 2 * 1000,  # read and written
    }


def test_short_products_are_made_larger_and_the_best_counts(monkeypatch):
    durations = itertools.chain([9.0, 0.004, 9.0, 0.5, 9.0], itertools.repeat(0.25))
    monkeypatch.setattr(ceilings, "_timed_s", lambda work, device: next(durations))
    rate = ceilings._matmul_flops_per_s(torch.device("cpu"), torch.float32)
    assert rate == 2 * 512**3 / 0.25


def test_a_real_one_is_a_positive_number():
    assert all(rate > 1e6 for rate in measure_ceilings("cpu", torch.float32).values())
