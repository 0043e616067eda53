"""Which form of an op is run: torch's, the Triton kernel beside it, or the C beside it.

The choice is an argument of every op and not a state: a checkpointed layer is run again on a thread of autograd's own,
which no context variable of the caller reaches.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from rlhfkernels.config.case import Case
from rlhfkernels.errors import CaseError
from rlhfkernels.ops.native import build

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def takes_triton(x: torch.Tensor, kernels: str) -> bool:
    """Whether an op over ``x`` runs its Triton form.

    Args:
        x: what the op reads. Its dtype must be one of bfloat16, float16 and float32; else it is torch's form.
        kernels: ``triton``; ``auto``, which is Triton on CUDA tensors where the package is there; or another form.
    """
    if kernels not in ("triton", "auto") or x.dtype not in _DTYPES:
        return False
    return kernels == "triton" or (x.is_cuda and is_installed("triton"))


def takes_native(kernels: str, *tensors: torch.Tensor) -> bool:
    """Whether an op runs its form in C.

    Args:
        kernels: ``native``, or another form.
        tensors: all that is read; float32 on a processor.
    """
    return kernels == "native" and all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in tensors)


def kernels_of(case: Case) -> str:
    """``triton``, ``native`` or ``torch``: what ``Options.kernels`` comes to on this machine.

    Raises:
        CaseError: Triton is asked for and not installed, or cannot start a kernel; or the C cannot be compiled.
    """
    kernels = case.options.engine.backend
    if kernels == "torch":
        return kernels
    form, failure = ("native", _no_native(case)) if case.device == "cpu" else ("triton", _no_triton(case))
    if failure is None:
        return form
    if kernels == "auto":
        return "torch"
    raise CaseError([f"engine.backend is {kernels!r}: {failure}"])


def _no_native(case: Case) -> str | None:
    """Why the ops in C cannot run; ``None`` where they can."""
    if case.dtype != "float32":
        return f"it has no {case.dtype}."
    failure = build.why_not()
    return None if failure is None else f"its C cannot be compiled here ({failure})."


def _no_triton(case: Case) -> str | None:
    """Why Triton cannot run; ``None`` where it can."""
    package = "triton"
    if not is_installed(package):
        return f"it needs {package}, which is not installed."
    failure = why_not(case.device)
    return None if failure is None else f"no kernel of it can be compiled and started here ({failure})."


@functools.cache
def why_not(device: str) -> str | None:
    """Why Triton, though installed, cannot run on ``device``: for want of a C compiler, say; ``None`` where it can."""
    try:
        from rlhfkernels.ops.triton.launch import try_out

        try_out(device)
    except Exception as error:  # compilers, drivers and packages that are half there fail in every way
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


@functools.cache
def is_installed(package: str) -> bool:
    """Whether ``package`` can be imported; it is not."""
    return importlib.util.find_spec(package) is not None
