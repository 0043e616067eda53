"""Calls of the ops in C on torch's tensors."""

from __future__ import annotations

import ctypes

import torch
from torch._subclasses.fake_tensor import FakeTensor

from rlhfkernels.ops.native.build import library
from rlhfkernels.ops.native.structures import Operands

# A thread with fewer numbers than this to go over is waited for as long.
_LEAST_NUMBERS = 2**13


def launch(
    function: str,
    kind: type[Operands],
    num_shares: int,
    strided: bool = False,
    /,
    **values: torch.Tensor | float | None,
) -> None:
    """Runs ``function``, once, on as many of torch's threads as are of use.

    Args:
        function: of the C files.
        kind: the structure that it takes.
        num_shares: into how many parts it can be divided.
        strided: its tensors may be of any strides, which are among the numbers.
        values: the structure's fields: contiguous tensors of a processor, or ``None``; numbers. Nothing is run where
            one is a fake tensor, as in a plan: they have memory that counts and no address.

    Raises:
        BuildError: there is no library on this machine.
    """
    packed = kind()
    most_numbers = 0
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            if isinstance(value, FakeTensor):
                return
            assert value.is_cpu, (function, name, value.device)
            assert strided or value.is_contiguous(), (function, name, value.stride())
            most_numbers = max(most_numbers, value.numel())
            setattr(packed, name, value.data_ptr())
        else:
            setattr(packed, name, value)
    threads = max(1, min(torch.get_num_threads(), num_shares, most_numbers // _LEAST_NUMBERS))
    getattr(library(), function)(ctypes.byref(packed), ctypes.c_int64(threads))
