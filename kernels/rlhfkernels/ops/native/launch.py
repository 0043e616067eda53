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
    if any(isinstance(value, FakeTensor) for value in values.values()):
        return
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    for name, tensor in tensors.items():
        assert tensor.is_cpu, (function, name, tensor.device)
        assert strided or tensor.is_contiguous(), (function, name, tensor.stride())
    packed = kind(**{**values, **{name: tensor.data_ptr() for name, tensor in tensors.items()}})
    useful = max(tensor.numel() for tensor in tensors.values()) // _LEAST_NUMBERS
    threads = max(1, min(torch.get_num_threads(), num_shares, useful))
    getattr(library(), function)(ctypes.byref(packed), ctypes.c_int64(threads))
