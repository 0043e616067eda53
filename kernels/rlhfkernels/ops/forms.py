"""Which form of an op is run: torch's, or the Triton kernels beside it.

The choice is an argument of every op and not a state: a checkpointed layer is run again on a thread of autograd's own,
which no context variable of the caller reaches.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from rlhfkernels.case import KERNEL_PACKAGES, Case
from rlhfkernels.errors import CaseError

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def takes_triton(x: torch.Tensor, kernels: str) -> bool:
    """Whether an op over ``x`` runs its Triton form.

    Args:
        x: what the op reads. Its dtype must be one of bfloat16, float16 and float32; else it is torch's form.
        kernels: ``torch``; ``triton``; or ``auto``, which is Triton on CUDA tensors where the package is there.
    """
    if kernels == "torch" or x.dtype not in _DTYPES:
        return False
    return kernels == "triton" or (x.is_cuda and is_installed("triton"))


def kernels_of(case: Case) -> str:
    """``triton`` or ``torch``: what ``Options.kernels`` comes to on this machine.

    Raises:
        CaseError: Triton is asked for and not installed, or cannot start a kernel.
    """
    kernels = case.options.kernels
    if kernels == "torch" or case.device == "cpu":
        return "torch"
    package = KERNEL_PACKAGES["triton"]
    if not is_installed(package):
        problem = f"it needs {package}, which is not installed."
    else:
        failure = why_not(case.device)
        if failure is None:
            return "triton"
        problem = f"no kernel of it can be compiled and started here ({failure})."
    if kernels == "auto":
        return "torch"
    raise CaseError([f"options.kernels is {kernels!r}: {problem}"])


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
