"""What libraries hold on a CUDA device beside all tensors: the scratch memory that torch gives cuBLAS, out of its own
allocator, once for every thread that multiplies.
"""

from __future__ import annotations

import os

import torch

_KIB = 2**10
_LARGE = 32 * 1024 * _KIB  # torch's choice from compute capability 9.0 on
_SMALL = (2 * 4096 + 8 * 16) * _KIB  # and before: NVIDIA's ":4096:2:16:8"
_NUM_THREADS = 2  # the step's own, and the device's thread of the backward


def workspace_bytes(device: str) -> int:
    """The workspaces of a step on the CUDA ``device``, once it has multiplied forward and backward."""
    major, _ = torch.cuda.get_device_capability(device)
    return _NUM_THREADS * blas_workspace_bytes(major, os.environ.get("CUBLAS_WORKSPACE_CONFIG"))


def blas_workspace_bytes(major: int, config: str | None) -> int:
    """One workspace of cuBLAS, as torch chooses it.

    Args:
        major: the device's compute capability.
        config: ``CUBLAS_WORKSPACE_CONFIG``: pairs of a size in KiB and a count (``:4096:2:16:8``), or nothing.
    """
    numbers = [int(word) for word in (config or "").split(":") if word.isdigit()]
    if len(numbers) >= 2:
        return sum(size * count for size, count in zip(numbers[::2], numbers[1::2], strict=False)) * _KIB
    return _LARGE if major >= 9 else _SMALL
