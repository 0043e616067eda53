"""The two ceilings of a device: how fast it multiplies large matrices, and how fast it copies large buffers."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from rlhfkernels.ops.native import build
from rlhfkernels.ops.native import matmul as native

_Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
_MATRIX_SECONDS = 0.1
_COPY_SECONDS = 0.1
_FIRST_SIDE = 256
# A product this long is long enough: larger ones would be no faster and cost time.
_LONG_PRODUCT_S = 0.005
_LARGEST_SIDE = {"cpu": 2048, "cuda": 8192}
_BUFFER_BYTES = {"cpu": 2**27, "cuda": 2**29}


def measure_ceilings(device: str | torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The best of several repetitions each, in less than half a second.

    Returns:
        ``matmul_flops_per_s``: of a square product in ``dtype``, two operations a multiply-add; the library's or, where
            that is faster, this project's.
        ``copy_bytes_per_s``: of a copy, each byte counted twice: read and written.
    """
    device = torch.device(device)
    with torch.inference_mode():
        return {
            "matmul_flops_per_s": _matmul_flops_per_s(device, dtype),
            "copy_bytes_per_s": _copy_bytes_per_s(device),
        }


def _matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    return max(_flops_per_s(multiply, device, dtype) for multiply in _products(device, dtype))


def _products(device: torch.device, dtype: torch.dtype) -> list[_Product]:
    """The library's product, and this project's own where it is the better one: a ceiling is not to be broken."""
    found: list[_Product] = [lambda left, right, out: torch.mm(left, right, out=out)]
    if device.type == "cpu" and dtype == torch.float32 and build.unavailable_reason() is None and native.beats_torch():
        found.append(native.matmul)
    return found


def _flops_per_s(multiply: _Product, device: torch.device, dtype: torch.dtype) -> float:
    side = _FIRST_SIDE
    while True:
        a = torch.ones(side, side, device=device, dtype=dtype)
        out = torch.empty_like(a)
        product_s = _best_s(lambda a=a, out=out: multiply(a, a, out), device, 0.0)  # type: ignore[misc]
        if product_s >= _LONG_PRODUCT_S or 2 * side > _LARGEST_SIDE[device.type]:
            break
        side *= 2
    best_s = min(product_s, _best_s(lambda: multiply(a, a, out), device, _MATRIX_SECONDS - product_s))
    return 2 * side**3 / best_s


def _copy_bytes_per_s(device: torch.device) -> float:
    num_bytes = _BUFFER_BYTES[device.type]
    source = torch.ones(num_bytes, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * num_bytes / _best_s(lambda: target.copy_(source), device, _COPY_SECONDS)


def _best_s(work: Callable[[], object], device: torch.device, for_s: float) -> float:
    """The shortest run of ``work`` within about ``for_s`` seconds, after one that is not counted."""
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
