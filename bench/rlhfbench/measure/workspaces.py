"""cuBLAS workspaces: CUDA memory of torch's allocator without a tensor, one per thread and stream that runs matmuls."""

from __future__ import annotations

import torch


def workspace_bytes(device: str) -> int:
    """Returns the bytes of all workspaces on the CUDA ``device``, and frees them: the next matmuls make them again.

    Their number is that of the threads and streams that have run matmuls: a step without a backward has one less.
    """
    before = torch.cuda.memory_allocated(device)
    torch._C._cuda_clearCublasWorkspaces()
    return before - torch.cuda.memory_allocated(device)
