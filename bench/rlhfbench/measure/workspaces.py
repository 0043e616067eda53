"""cuBLAS workspaces: CUDA memory of torch's allocator without a tensor, one per thread and stream that runs matmuls."""

from __future__ import annotations

import os

import torch

from rlhfkernels.engine.fast.capture import num_side_streams

_KIB = 2**10
_LARGE = 32 * 1024 * _KIB  # torch's default from compute capability 9.0 on
_SMALL = (2 * 4096 + 8 * 16) * _KIB  # torch's default before: NVIDIA's ":4096:2:16:8"
_NUM_THREADS = 2  # the main thread, and autograd's thread of the device


def workspace_bytes(device: str) -> int:
    """Returns the bytes of all workspaces on the CUDA ``device`` after a forward and a backward pass."""
    major, _ = torch.cuda.get_device_capability(device)
    return (_NUM_THREADS + num_side_streams()) * blas_workspace_bytes(major, os.environ.get("CUBLAS_WORKSPACE_CONFIG"))


def blas_workspace_bytes(major: int, config: str | None) -> int:
    """Returns the bytes of one cuBLAS workspace, by torch's rules.

    Args:
        major: Major compute capability of the device.
        config: ``CUBLAS_WORKSPACE_CONFIG``: pairs of a size in KiB and a count (``:4096:2:16:8``); ``None`` if unset.
    """
    numbers = [int(word) for word in (config or "").split(":") if word.isdigit()]
    if len(numbers) >= 2:
        return sum(size * count for size, count in zip(numbers[::2], numbers[1::2], strict=False)) * _KIB
    return _LARGE if major >= 9 else _SMALL
