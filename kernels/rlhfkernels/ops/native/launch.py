"""Runs one op in C on torch's tensors."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch._subclasses.fake_tensor import FakeTensor

from rlhfkernels.ops.native.build import library
from rlhfkernels.ops.native.structures import INT64_FIELDS, Command, Integer, Operands, Pointer

# Below this size, synchronization costs more than the work of another thread.
_MIN_ELEMENTS_PER_THREAD = 2**13


# Names by address of the ops that were run or recorded: a profile names them.
OP_NAMES: dict[int, str] = {}


@functools.cache
def op_address(name: str) -> int:
    """Returns the address of the C function ``run_<name>``."""
    address = ctypes.cast(getattr(library(), f"run_{name}"), Pointer).value
    assert address is not None
    OP_NAMES[address] = name
    return address


def check_operand(name: str, tensor: torch.Tensor, *, strided: bool = False) -> None:
    """Refuses a tensor that C would misread.

    Args:
        name: the field that the tensor fills.
        tensor: the operand.
        strided: allow any strides.

    Raises:
        ValueError: the tensor is not on the CPU, has the wrong dtype or is not contiguous.
    """
    dtype = torch.int64 if name in INT64_FIELDS else torch.float32
    if not tensor.is_cpu or tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}: it must be {dtype} on the CPU.")
    if not strided and not tensor.is_contiguous():
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, strides {tensor.stride()}: it must be contiguous.")


def check_shape(name: str, tensor: torch.Tensor | None, *shape: int) -> None:
    """Refuses a tensor of another shape; ``None`` passes.

    Raises:
        ValueError: the shape differs.
    """
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must have {shape}.")


def launch(
    name: str,
    structure: type[Operands],
    num_shares: int,
    strided: bool = False,
    /,
    **values: torch.Tensor | float | None,
) -> None:
    """Runs one op on as many of torch's threads as are of use.

    Fake tensors, as in a memory plan, have no address: the op is skipped.

    Args:
        name: the op in C.
        structure: its operands.
        num_shares: maximum number of parts that the work divides into.
        strided: the tensors may have any strides, which are among ``values``.
        values: the fields: CPU tensors, numbers, or ``None`` for a null pointer.

    Raises:
        BuildError: the library cannot be built on this machine.
        ValueError: an operand has the wrong device, dtype or strides.
    """
    operands = structure()
    max_elements = 0
    for field, value in values.items():
        if isinstance(value, torch.Tensor):
            if isinstance(value, FakeTensor):
                return
            check_operand(field, value, strided=strided)
            max_elements = max(max_elements, value.numel())
            setattr(operands, field, value.data_ptr())
        else:
            setattr(operands, field, value)
    num_threads = max(1, min(torch.get_num_threads(), num_shares, max_elements // _MIN_ELEMENTS_PER_THREAD))
    command = Command(run=op_address(name), operands=ctypes.addressof(operands))
    library().run_program(ctypes.byref(command), Integer(1), None, Integer(num_threads))


@functools.cache
def scratch_size(op: str, *sizes: int) -> int:
    """Returns the number of floats of scratch memory that ``op`` needs for one thread."""
    function = getattr(library(), f"{op}_scratch")
    function.restype = ctypes.c_int64
    return int(function(*map(Integer, sizes)))
