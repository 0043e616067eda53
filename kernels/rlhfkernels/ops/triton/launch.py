"""How wide a kernel's blocks are, how it is compiled, and on which device it runs."""

from typing import Any

import torch
import triton
import triton.language as tl

# The widest row that a kernel holds at once: 16384 float32 numbers are 32 registers of each of 16 warps' threads.
WIDEST_ROW = 16384


def block_of(size: int, most: int) -> int:
    """The power of two that holds ``size`` numbers, ``most`` at most."""
    return min(int(triton.next_power_of_2(size)), most)


def options(block: int) -> dict[str, Any]:
    """How a kernel over ``block`` numbers at a time is compiled: eight of them a thread, in 1 warp to 16."""
    # Multiply-adds are fused, as in torch's own kernels; left unsaid, newer versions of Triton warn of their default.
    return {"num_warps": max(1, min(16, block // 256)), "enable_fp_fusion": True}


def on_device_of(x: torch.Tensor) -> torch.cuda.device_of:
    """A kernel is started on the current device, whatever its tensors: makes theirs the current one."""
    return torch.cuda.device_of(x)


@triton.jit
def _one_kernel(x_ptr):
    tl.store(x_ptr, 1.0)


def try_out(device: str) -> None:
    """Compiles a kernel, starts it on ``device`` and waits for it.

    Raises:
        Exception: whatever a missing compiler, header, driver or device has Triton or torch say.
    """
    x = torch.zeros(1, device=device)
    with on_device_of(x):
        _one_kernel[(1,)](x, **options(1))
    if float(x) != 1.0:
        raise RuntimeError(f"a kernel that writes 1 wrote {float(x)}")
