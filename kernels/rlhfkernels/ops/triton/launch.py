"""Block sizes, compile options and device of kernel launches."""

from typing import Any

import torch
import triton
import triton.language as tl

# Largest row that a kernel holds in registers: 16384 float32 elements are 32 registers a thread in 16 warps.
MAX_ROW_SIZE = 16384


def block_size(size: int, max_size: int) -> int:
    """Returns the power of two that holds ``size`` elements, at most ``max_size``."""
    return min(int(triton.next_power_of_2(size)), max_size)


def compile_options(block: int) -> dict[str, Any]:
    """Returns the compile options of a kernel on blocks of ``block`` elements: 8 a thread, in 1 to 16 warps."""
    # torch's kernels fuse multiply-adds too. Without the option, newer versions of Triton warn about their default.
    return {"num_warps": max(1, min(16, block // 256)), "enable_fp_fusion": True}


def on_device_of(x: torch.Tensor) -> torch.cuda.device_of:
    """Makes the device of ``x`` current: a kernel starts on the current device, wherever its tensors are."""
    return torch.cuda.device_of(x)


@triton.jit
def _test_kernel(x_ptr):
    tl.store(x_ptr, 1.0)


def run_test_kernel(device: str) -> None:
    """Compiles a kernel, runs it on ``device`` and checks its result.

    Raises:
        Exception: anything that Triton or torch raise without a compiler, header, driver or device.
    """
    x = torch.zeros(1, device=device)
    with on_device_of(x):
        _test_kernel[(1,)](x, **compile_options(1))
    if float(x) != 1.0:
        raise RuntimeError(f"a kernel that writes 1 wrote {float(x)}")
