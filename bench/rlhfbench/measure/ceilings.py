"""The ceilings of a device's roofline: FLOP/s of a large matmul, and bytes/s of a large copy and of a large read."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from rlhfkernels.errors import CaseError
from rlhfkernels.ops.native import build
from rlhfkernels.ops.native import matmul as native

# In the order in which ``Work.floor_s`` takes them.
RATES = ("matmul_flops_per_s", "copy_bytes_per_s", "read_bytes_per_s")

_Matmul = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
# Measured with every block, of which a case has four, and the highest rate counts: 0.12 s on two cores of an AMD EPYC.
_BUDGET_S = 0.02
_MIN_SIDE = 256
# Sides double until a matmul takes this long: larger ones are no faster and cost time.
_MIN_MATMUL_S = 0.005
_MAX_SIDE = {"cpu": 1024, "cuda": 8192}
_BUFFER_BYTES = {"cpu": 2**26, "cuda": 2**29}


def measure_ceilings(device: str | torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measures the ceilings, the best of several repetitions each.

    Returns:
        ``matmul_flops_per_s``: Rate of a square matmul in ``dtype``; a multiply-add counts as two FLOPs. The faster of
            torch's matmul and this project's native backend, so that no phase can beat its own ceiling.
        ``copy_bytes_per_s``: Rate of a copy; each byte counts twice, read and written.
        ``read_bytes_per_s``: Rate of a sum over a buffer, which only reads.
    """
    device = torch.device(device)
    num_bytes = _BUFFER_BYTES[device.type]
    with torch.inference_mode():
        flops_per_s = _flops_per_s(_fastest_matmul(device, dtype), device, dtype)
        # Elements of 4 bytes: a sum over bytes would be bound by its arithmetic.
        source = torch.ones(num_bytes // 4, device=device, dtype=torch.float32)
        target = torch.empty_like(source)
        return {
            "matmul_flops_per_s": flops_per_s,
            "copy_bytes_per_s": 2 * num_bytes / _best_s(lambda: target.copy_(source), device, _BUDGET_S),
            "read_bytes_per_s": num_bytes / _best_s(source.sum, device, _BUDGET_S),
        }


def _fastest_matmul(device: torch.device, dtype: torch.dtype) -> _Matmul:
    """Returns the native backend's matmul where it is the faster one, else torch's.

    Raises:
        CaseError: the environment names a matmul that there is not.
    """
    try:
        if (
            device.type == "cpu"
            and dtype == torch.float32
            and build.unavailable_reason() is None
            and native.beats_torch()
        ):
            return native.matmul
    except ValueError as error:
        raise CaseError([str(error)]) from error
    return lambda left, right, out: torch.mm(left, right, out=out)


def _flops_per_s(multiply: _Matmul, device: torch.device, dtype: torch.dtype) -> float:
    side = _MIN_SIDE
    while True:
        a = torch.ones(side, side, device=device, dtype=dtype)
        out = torch.empty_like(a)
        matmul_s = _best_s(lambda a=a, out=out: multiply(a, a, out), device, 0.0)  # type: ignore[misc]
        if matmul_s >= _MIN_MATMUL_S or 2 * side > _MAX_SIDE[device.type]:
            break
        side *= 2
    best_s = min(matmul_s, _best_s(lambda: multiply(a, a, out), device, _BUDGET_S - matmul_s))
    return 2 * side**3 / best_s


def _best_s(work: Callable[[], object], device: torch.device, for_s: float) -> float:
    """Returns the shortest time of ``work`` over about ``for_s`` seconds of repetitions, after one warm-up run."""
    _timed_s(work, device)
    best_s = spent_s = _timed_s(work, device)
    while spent_s < for_s:
        run_s = _timed_s(work, device)
        best_s = min(best_s, run_s)
        spent_s += run_s
    return best_s


def _timed_s(work: Callable[[], object], device: torch.device) -> float:
    started_s = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started_s
