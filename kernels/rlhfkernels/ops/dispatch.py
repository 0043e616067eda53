"""Selects the backend of an op for given tensors: ``torch``, ``triton`` or ``native`` (C).

The backend is an argument of every op, not a context variable: autograd recomputes a checkpointed layer on its own
thread, which sees no context variable of the caller.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# The type of the device whose choices ops make on CPU tensors. No context variable, for the reason above.
_stood_for = "cpu"


@contextmanager
def standing_for(device: str) -> Iterator[None]:
    """Has ops on CPU tensors take the ways that they take on ``device``: a plan's tensors stand for that device's."""
    global _stood_for
    before, _stood_for = _stood_for, torch.device(device).type
    try:
        yield
    finally:
        _stood_for = before


def is_on_cpu(x: torch.Tensor) -> bool:
    """Returns whether ``x`` is on the CPU and stands for no other device's."""
    return x.is_cpu and _stood_for == "cpu"


def takes_triton(x: torch.Tensor, backend: str) -> bool:
    """Returns whether an op on ``x`` runs its Triton kernel.

    Args:
        x: the input, in bfloat16, float16 or float32; other dtypes are left to torch.
        backend: ``triton``, or ``auto``, which is Triton for CUDA tensors if the package is installed.
    """
    if backend not in ("triton", "auto") or x.dtype not in _TRITON_DTYPES:
        return False
    return backend == "triton" or (x.is_cuda and is_installed("triton"))


def takes_native(backend: str, *tensors: torch.Tensor) -> bool:
    """Returns whether an op on ``tensors`` runs in C: the backend is ``native`` and all are float32 on the CPU."""
    return backend == "native" and all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in tensors)


@functools.cache
def triton_unavailable_reason(device: str) -> str | None:
    """Returns why the installed Triton cannot run on ``device``, in one line, or ``None`` if it can."""
    try:
        from rlhfkernels.ops.triton.launch import run_test_kernel

        run_test_kernel(device)
    except Exception as error:  # compilers, drivers and incomplete packages fail in every way
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


@functools.cache
def is_installed(package: str) -> bool:
    """Returns whether ``package`` can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None
