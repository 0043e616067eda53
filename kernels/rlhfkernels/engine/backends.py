"""Selects the backend of a case's ops on this machine."""

from __future__ import annotations

import torch

from rlhfkernels.errors import CaseError
from rlhfkernels.ops.causal_attention import FLASH
from rlhfkernels.ops.dispatch import is_installed, triton_unavailable_reason
from rlhfkernels.ops.native import build
from rlhfkernels.ops.native.matmul import beats_torch
from rlhfkernels.ops.rms_norm import LIGER


def select_backend(backend: str, device: str, dtype: str) -> str:
    """Resolves ``engine.backend``.

    Args:
        backend: ``auto``, ``torch``, ``triton`` or ``native``. ``auto`` is C on the CPU and Triton on CUDA, or torch
            where these cannot run.
        device: of the case.
        dtype: of the case.

    Returns:
        ``torch``, ``triton`` or ``native``.

    Raises:
        CaseError: the requested backend cannot run on this machine.
    """
    if backend == "torch":
        return backend
    is_cpu = device == "cpu"
    reason = _native_unavailable_reason(dtype) if is_cpu else _triton_unavailable_reason(device)
    if reason is None and is_cpu:
        try:
            beats_torch()  # measures where no times are stored: here, not inside a step
        except ValueError as error:
            raise CaseError([str(error)]) from error
    if reason is None and not is_cpu:
        _measure_library_kernels(torch.device(device), getattr(torch, dtype))
    if reason is None:
        return "native" if is_cpu else "triton"
    if backend == "auto":
        return "torch"
    raise CaseError([f"engine.backend is {backend!r}: {reason}"])


def _measure_library_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Measures the ops of installed libraries where no times are stored: here, not inside a step."""
    for library in (LIGER, FLASH):
        library.applies_to(torch.empty(0, device=device, dtype=dtype), "auto")


def _native_unavailable_reason(dtype: str) -> str | None:
    if dtype != "float32":
        return f"it has no {dtype}."
    reason = build.unavailable_reason()
    return None if reason is None else f"its C cannot be compiled here ({reason})."


def _triton_unavailable_reason(device: str) -> str | None:
    if not is_installed("triton"):
        return "it needs triton, which is not installed."
    reason = triton_unavailable_reason(device)
    return None if reason is None else f"no kernel of it can be compiled and started here ({reason})."
