import itertools
import time

import pytest
import torch

from rlhfbench.measure import ceilings
from rlhfbench.measure.ceilings import measure_ceilings
from rlhfkernels.errors import CaseError


@pytest.fixture
def seconds(monkeypatch):
    """A clock that advances one second per reading, so that every run takes exactly one second."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_rate_is_work_over_time(seconds, monkeypatch, dtype):
    monkeypatch.setitem(ceilings._BUFFER_BYTES, "cpu", 1000)
    monkeypatch.setattr(ceilings.native, "beats_torch", lambda: False)
    assert measure_ceilings("cpu", dtype) == {
        "matmul_flops_per_s": 2 * 256**3,  # a matmul of one second is long enough: no larger one is tried
        "copy_bytes_per_s": 2 * 1000,  # read and written
        "read_bytes_per_s": 1000,
    }


def test_short_matmuls_are_enlarged_and_the_fastest_run_counts(monkeypatch):
    durations = itertools.chain([9.0, 0.004, 9.0, 0.5, 9.0], itertools.repeat(0.25))
    monkeypatch.setattr(ceilings, "_timed_s", lambda work, device: next(durations))
    rate = ceilings._flops_per_s(torch.matmul, torch.device("cpu"), torch.float32)
    assert rate == 2 * 512**3 / 0.25


def test_a_wrong_matmul_in_the_environment_is_one_sentence(monkeypatch):
    monkeypatch.setattr(ceilings.build, "unavailable_reason", lambda: None)

    def refuse():
        raise ValueError("RLHFBENCH_CPU_MATMUL is 'mkl': it must be native, torch or auto.")

    monkeypatch.setattr(ceilings.native, "beats_torch", refuse)
    with pytest.raises(CaseError, match=r"^RLHFBENCH_CPU_MATMUL is 'mkl': it must be native, torch or auto\.$"):
        ceilings._fastest_matmul(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("dtype", "failure", "beats", "is_native"),
    [
        (torch.float32, None, True, True),
        (torch.float32, None, False, False),
        (torch.float32, "no cc is installed", True, False),
        (torch.bfloat16, None, True, False),
    ],
)
def test_the_ceiling_is_the_native_matmuls_where_it_is_faster(monkeypatch, dtype, failure, beats, is_native):
    monkeypatch.setattr(ceilings.build, "unavailable_reason", lambda: failure)
    monkeypatch.setattr(ceilings.native, "beats_torch", lambda: beats)
    assert (ceilings._fastest_matmul(torch.device("cpu"), dtype) is ceilings.native.matmul) is is_native


def test_real_rates_are_positive():
    assert all(rate > 1e6 for rate in measure_ceilings("cpu", torch.float32).values())
