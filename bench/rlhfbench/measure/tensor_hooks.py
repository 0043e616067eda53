"""Hooks into torch that report every storage that an op, autograd or a resize touches.

- A dispatch mode sees the tensors of every op, below autograd and in autograd's threads.
- Saved-tensor hooks see what autograd keeps.
- A patch of ``saved_tensors_hooks`` covers hooks that are entered later, such as those of activation checkpointing:
  torch calls only the innermost ones.
- A patch of ``UntypedStorage.resize_`` sees resizes, which are no op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode


class StorageObserver(Protocol):
    """Receiver of the reports; implemented by ``LiveStorages``."""

    def on_tensor(self, tensor: torch.Tensor, op: object) -> None:
        """Called for every output of ``op``, and with ``None`` for every input of an op."""

    def on_write(self, tensor: torch.Tensor) -> None:
        """Called after an op that may have written into ``tensor``."""

    def on_resize(self, storage: torch.UntypedStorage, num_bytes_before: int) -> None:
        """Called after ``storage`` was resized."""

    def on_collective(self, op: object, tensors: Iterable[torch.Tensor]) -> None:
        """Called after a collective of ``torch.distributed`` began to read and write ``tensors``."""

    def on_save(self, tensor: torch.Tensor, saved: object) -> None:
        """Called when autograd saves ``tensor``; it holds it for as long as ``saved`` lives."""


@contextmanager
def observe_storages(observer: StorageObserver) -> Iterator[None]:
    """Reports to ``observer`` inside the block."""
    with ExitStack() as stack:
        stack.enter_context(_observe_resizes(observer))
        stack.enter_context(saved_tensors_hooks(lambda tensor: _saved(observer, tensor), _unpacked))
        stack.enter_context(_observe_inner_hooks(observer))
        stack.enter_context(_OpObserver(observer))
        yield


_DEVICE = torch.ops.prim.device.default
# Of the ops that send: those of process groups, and their functional twins.
_COLLECTIVES = ("c10d", "_c10d_functional")


class _OpObserver(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Reports every op's inputs (they may be older than the block), outputs, and tensors written in place."""

    def __init__(self, observer: StorageObserver) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._observer = observer
        self._kinds: dict[Any, tuple[bool, bool]] = {}  # whether an op writes to its inputs, and whether it sends them

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Skips dynamo's check: it would import the compiler at the first op, and nothing is compiled here."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE:  # fake tensors ask this for every argument of every op: shortcut
            return args[0].fake_device
        on_tensor = self._observer.on_tensor
        for tensor in _tensors(args):
            on_tensor(tensor, None)
        if kwargs:
            for tensor in _tensors(kwargs.values()):
                on_tensor(tensor, None)
        result = func(*args, **kwargs) if kwargs else func(*args)
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = (bool(func._schema.is_mutable), func.namespace in _COLLECTIVES)
        writes, sends = kind
        if writes:
            for tensor in _tensors(args):
                self._observer.on_write(tensor)
            if kwargs:
                for tensor in _tensors(kwargs.values()):
                    self._observer.on_write(tensor)
        if isinstance(result, torch.Tensor):
            on_tensor(result, func)
        elif result is not None:
            for tensor in _tensors(result if isinstance(result, (list, tuple)) else (result,)):
                on_tensor(tensor, func)
        if sends:
            self._observer.on_collective(func, _nested_tensors([args, result]))
        return result


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """Returns the tensors in ``values``, one level of lists deep: the deepest nesting that op schemas allow."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, torch.Tensor)]
    return found


def _nested_tensors(value: Any) -> list[torch.Tensor]:
    """Returns the tensors in ``value``, however deep: a gather takes lists of lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _nested_tensors(item)] if isinstance(value, (list, tuple)) else []


class _SavedParameter:
    """A saved parameter, by reference: ZeRO-3 frees its storage between forward and backward, and an alias keeps it."""

    __slots__ = ("__weakref__", "parameter")

    def __init__(self, parameter: torch.Tensor) -> None:
        self.parameter = parameter


def _saved(observer: StorageObserver, tensor: torch.Tensor) -> object:
    """An object that only autograd holds for ``tensor``, so that its lifetime is that of the saved reference."""
    if not isinstance(tensor, torch.nn.Parameter):
        return _saved_alias(observer, tensor)
    saved = _SavedParameter(tensor)
    observer.on_save(tensor, saved)
    return saved


def _unpacked(saved: Any) -> torch.Tensor:
    tensor: torch.Tensor = saved.parameter if isinstance(saved, _SavedParameter) else saved
    return tensor


def _saved_alias(observer: StorageObserver, tensor: torch.Tensor) -> torch.Tensor:
    """Returns an alias of ``tensor`` that only autograd holds, so that its lifetime is that of the saved reference.

    It is detached: an op's output saved with its own graph would keep itself alive forever.
    """
    alias = tensor.detach()
    observer.on_save(tensor, alias)
    return alias


@contextmanager
def _observe_inner_hooks(observer: StorageObserver) -> Iterator[None]:
    """Makes saved-tensor hooks that are entered later report to ``observer`` too: torch calls only the innermost.

    Non-reentrant checkpointing enters such hooks. In the forward pass they keep nothing; in the recomputation they keep
    each tensor until the backward pass has used it. They get aliases, whose lifetime is observed, and parameters as
    they are: hooks that offload activations tell them by their type.
    """
    enter = saved_tensors_hooks.__enter__

    def enter_observed(hooks: saved_tensors_hooks) -> None:
        pack: Callable[[torch.Tensor], Any] = hooks.pack_hook

        def pack_observed(tensor: torch.Tensor) -> Any:
            return pack(tensor if isinstance(tensor, torch.nn.Parameter) else _saved_alias(observer, tensor))

        hooks.pack_hook = pack_observed
        try:
            enter(hooks)
        finally:
            hooks.pack_hook = pack

    saved_tensors_hooks.__enter__ = enter_observed  # type: ignore[method-assign]
    try:
        yield
    finally:
        saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]


@contextmanager
def _observe_resizes(observer: StorageObserver) -> Iterator[None]:
    """Patches ``UntypedStorage.resize_``, which no dispatch mode sees."""
    resize = torch.UntypedStorage.resize_

    def resize_observed(storage: torch.UntypedStorage, size: int) -> Any:
        before = storage.nbytes()
        result = resize(storage, size)
        observer.on_resize(storage, before)
        return result

    torch.UntypedStorage.resize_ = resize_observed  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
