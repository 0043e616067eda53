"""How the ledger gets to know: the hooks into torch, put in place and taken away again.

Four of them: a dispatch mode sees every op's tensors, under autograd and in its threads; hooks on saved tensors see
what autograd keeps; those hooks stand also behind other people's (activation checkpointing has its own, and only the
innermost are called); and the one way to resize a storage without an op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode


class StorageObserver(Protocol):
    """What is told of storages; ``Ledger`` says what each means."""

    def on_tensor(self, tensor: torch.Tensor, op: object) -> None:
        """An op has made ``tensor``, or with ``None`` takes it."""

    def on_write(self, tensor: torch.Tensor) -> None:
        """An op may have written into ``tensor``."""

    def on_resize(self, storage: torch.UntypedStorage) -> None:
        """``storage`` has another size."""

    def on_save(self, tensor: torch.Tensor, alias: torch.Tensor) -> None:
        """Autograd holds ``tensor``, for as long as ``alias`` lives."""


@contextmanager
def observe_storages(observer: StorageObserver) -> Iterator[None]:
    """Tells ``observer`` of every storage that an op, autograd or a resize touches in the meantime."""
    with ExitStack() as stack:
        stack.enter_context(_observe_resizes(observer))
        stack.enter_context(saved_tensors_hooks(lambda tensor: _saved_alias(observer, tensor), lambda alias: alias))
        stack.enter_context(_observe_inner_hooks(observer))
        stack.enter_context(_OpObserver(observer))
        yield


_DEVICE = torch.ops.prim.device.default


class _OpObserver(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every op: inputs (they may have been made before), outputs, and what the op wrote into."""

    def __init__(self, observer: StorageObserver) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._observer = observer
        self._writes: dict[Any, bool] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and the guard against it would import the compiler at the first op."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE:  # asked of a fake tensor for every argument of every op
            return args[0].fake_device
        on_tensor = self._observer.on_tensor
        for tensor in _tensors(args):
            on_tensor(tensor, None)
        result = func(*args, **kwargs) if kwargs else func(*args)
        writes = self._writes.get(func)
        if writes is None:
            writes = self._writes[func] = bool(func._schema.is_mutable)
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
        return result


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors among ``values`` and in lists and tuples among them (the deepest that an op's schema allows)."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, torch.Tensor)]
    return found


def _saved_alias(observer: StorageObserver, tensor: torch.Tensor) -> torch.Tensor:
    """An alias that only autograd holds: it lives exactly as long as the saved reference.

    It must be detached also because a saved output that held itself would never be freed.
    """
    alias = tensor.detach()
    observer.on_save(tensor, alias)
    return alias


@contextmanager
def _observe_inner_hooks(observer: StorageObserver) -> Iterator[None]:
    """Hands aliases to hooks that are entered from now on, so that what they keep is seen for as long as they keep it.

    Under non-reentrant checkpointing the forward's hooks keep nothing, and the recomputation's keep each tensor until
    the backward has used it. Only the innermost hooks are ever called, so ours have to stand behind theirs.
    """
    enter = saved_tensors_hooks.__enter__

    def enter_observed(hooks: saved_tensors_hooks) -> None:
        pack: Callable[[torch.Tensor], Any] = hooks.pack_hook
        hooks.pack_hook = lambda tensor: pack(_saved_alias(observer, tensor))
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
    """``tensor.untyped_storage().resize_(n)`` is no op, so the method itself is watched."""
    resize = torch.UntypedStorage.resize_

    def resize_observed(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        observer.on_resize(storage)
        return result

    torch.UntypedStorage.resize_ = resize_observed  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
