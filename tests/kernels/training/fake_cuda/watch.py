"""A dispatch mode that reads off every op of a step which devices, dtypes and synchronizations it has."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhfkernels import Observer

aten = torch.ops.aten
# Ops whose result the host must know before it can go on.
WAITS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten._to_copy.default, aten.copy_.default}
# How a tensor of Python numbers begins, which is copied to the device next.
BEGINNINGS = {aten.lift_fresh.default, torch.ops.prim.device.default}


class Watch(TorchDispatchMode, Observer):
    """Lists what a step on ``device`` does that a GPU would refuse or wait for; runs inside a fake tensor mode.

    Attributes:
        problems: "kind: op at file:line", once each: ``host tensor``, ``host index``, ``generator``, ``float64``.
        waits: "phase: op at file:line" of every op that waits for the device inside a phase, as often as it runs.
        num_ops: ops seen.
    """

    def __init__(self, device: torch.device, *, wide: bool) -> None:
        super().__init__()
        self.device, self._wide = device, wide
        self._phases: list[str] = []
        self.problems: list[str] = []
        self.waits: list[str] = []
        self.num_ops = self.num_launches = 0

    def enter_phase(self, name: str) -> None:
        self._phases.append(name)

    def exit_phase(self, name: str) -> None:
        self._phases.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.num_ops += 1
        if self._phases and self._waits(func, args, kwargs):
            self.waits.append(f"{self._phases[-1]}: {func} at {caller()}")
        if func is aten._local_scalar_dense.default:
            # A fake tensor has no value: 0 stands for it, so that a loop goes on.
            return zero_of(args[0].dtype)
        result = func(*args, **kwargs)
        for kind in self._mistakes(func, args, kwargs, result):
            problem = f"{kind}: {func} at {caller()}"
            if problem not in self.problems:
                self.problems.append(problem)
        return result

    def _waits(self, func: Any, args: Any, kwargs: Any) -> bool:
        if func in INDEXING:
            return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if func in COPIES:
            target = torch.device(kwargs.get("device") or args[0].device)
            source = args[0] if func is aten._to_copy.default else args[1]
            if source.numel() == 0:  # as the keys and values that transformers' dynamic cache starts from
                return False
            blocking = not (kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:3] == (True,)))
            to_host = source.device != target and target.type == "cpu"
            return to_host or (source.device.type == "cpu" and target.type != "cpu" and blocking)
        return func in WAITS and any(t.device == self.device for t in tensors(args))

    def _mistakes(self, func: Any, args: Any, kwargs: Any, result: Any) -> Iterator[str]:
        """The kinds of mistakes of one op. A copy to the device may read the host."""
        if func in INDEXING and any(t is not None and t.device != self.device for t in args[1]):
            yield "host index"
        read = [] if func in COPIES else list(tensors((args, kwargs)))
        if func not in BEGINNINGS and any(t.device != self.device for t in [*read, *tensors(result)]):
            yield "host tensor"
        generators = [g for g in tree_leaves((args, kwargs)) if isinstance(g, torch.Generator)]
        if any(g.device.type != self.device.type for g in generators):
            yield "generator"
        if not self._wide and any(t.dtype == torch.float64 for t in tensors(result)):
            yield "float64"


def tensors(values: Any) -> Iterable[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def zero_of(dtype: torch.dtype) -> bool | int | float:
    return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0


def caller() -> str:
    """``file:line`` of the nearest frame of the package; ``backward`` where autograd's thread has none."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/rlhfkernels/" in name:
            return f"{name.rsplit('/rlhfkernels/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "backward"
