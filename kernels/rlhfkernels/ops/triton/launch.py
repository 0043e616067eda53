"""How wide a kernel's blocks are, by how many warps they are run, and on which device."""

import torch
import triton

# The widest row that a kernel holds at once: 16384 float32 numbers are 32 registers of each of 16 warps' threads.
WIDEST_ROW = 16384


def block_of(size: int, most: int) -> int:
    """The power of two that holds ``size`` numbers, ``most`` at most."""
    return min(int(triton.next_power_of_2(size)), most)


def num_warps(block: int) -> int:
    """Eight numbers a thread, from 1 warp to 16."""
    return max(1, min(16, block // 256))


def on_device_of(x: torch.Tensor) -> torch.cuda.device_of:
    """A kernel is started on the current device, whatever its tensors: makes theirs the current one."""
    return torch.cuda.device_of(x)
