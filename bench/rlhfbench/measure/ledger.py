"""The ledger: every live byte of a device, by what it is for and by the phase of the step.

It is a sum over tensor storages: a storage is counted once, whole, from the op that made it until it dies, however many
views look into it. So it is exact on any device, and on fake tensors as well. What it cannot see is what has no tensor:
the scratch memory inside one op, an allocator's rounding, a library's workspace.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rlhfbench.measure.tensor_hooks import observe_storages
from rlhfkernels.naming import unknown
from rlhfkernels.observer import PARTS, Observer

MODEL_PARTS = ("base", "adapters", "heads", "gradients", "optimizer")
ACTIVATION_PARTS = ("kv_cache", "activations", "temporary")

# What an allocator hands memory out in: torch's own on CUDA rounds every request up to this; on a processor, bytes.
_BLOCK_BYTES = {"cuda": 512}

_INDEX = {part: index for index, part in enumerate(PARTS)}
_MODEL = frozenset(_INDEX[part] for part in MODEL_PARTS)
_GRADIENTS, _ACTIVATIONS, _TEMPORARY = (_INDEX[part] for part in ("gradients", "activations", "temporary"))


def block_bytes(device: str) -> int:
    """The blocks in which memory is counted on ``device``."""
    return _BLOCK_BYTES.get(torch.device(device).type, 1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The live bytes of one moment; the parts sum exactly to the total.

    Attributes:
        event: how many changes the ledger had seen then: the moment's place in a timeline.
    """

    total_bytes: int
    parts: dict[str, int]
    event: int = dataclasses.field(default=0, compare=False)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LargestTensor:
    """A single storage, with the shape of the tensor and the op that it was first seen with (``None``: made before)."""

    num_bytes: int
    shape: tuple[int, ...]
    op: str | None


class _Entry(weakref.ref[torch.UntypedStorage]):
    """What is known of one live storage. A weak reference: its callback is the storage's death.

    Attributes:
        key: the address of the storage, unique while it lives.
        part: index into ``PARTS`` of the part that it is counted in now.
        declared: whether that part was declared (then it stays) or found by looking.
        num_saved: references to it that autograd holds.
    """

    __slots__ = ("declared", "key", "num_bytes", "num_saved", "op", "part", "shape")

    key: int
    num_bytes: int
    part: int
    declared: bool
    num_saved: int
    shape: torch.Size
    op: Any


class _SavedRef(weakref.ref[torch.Tensor]):
    """One reference that autograd holds; its callback is the end of it."""

    __slots__ = ("entry",)

    entry: _Entry


class _Peak:
    """The highest total of a stretch of time, and the parts at that moment."""

    __slots__ = ("event", "parts", "total")

    def __init__(self) -> None:
        self.total = 0
        self.parts = [0] * len(PARTS)
        self.event = 0

    def take(self, total: int, parts: list[int], event: int) -> None:
        self.total, self.parts, self.event = total, parts.copy(), event

    def snapshot(self) -> Snapshot:
        parts = dict(zip(PARTS, self.parts, strict=True))
        return Snapshot(total_bytes=self.total, parts=parts, event=self.event)


class Ledger(Observer):
    """Counts live bytes by part while it is entered; hand it to ``step.run`` as the observer.

    A storage that was declared with ``tag`` keeps its part while it lives (the first declaration wins). Of the others,
    those are ``activations`` to which autograd holds a saved reference at that moment, and the rest is ``temporary``.
    Gradients are declared by the ledger itself, as they come, for the parameters given to ``track_gradients``.

    Args:
        device: storages on other devices are not counted. Without an index: every device of that type.
        block_bytes: storages are counted in whole blocks of this size, as a device's allocator hands them out.
        on_change: called after every change with the live bytes by part, in the order of ``PARTS`` (the ledger's own
            list: copy it to keep it).

    Attributes:
        num_changes: storages seen, resized, moved between parts and freed so far.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        on_change: Callable[[Sequence[int]], None] | None = None,
        *,
        block_bytes: int = 1,
    ) -> None:
        self._block_bytes = block_bytes
        self._device = torch.device(device)
        self._on_change = on_change
        self._entries: dict[int, _Entry] = {}
        self._saved: dict[int, _SavedRef] = {}
        self._parts = [0] * len(PARTS)
        self._total = 0
        self._outside = self._peak = _Peak()
        self._peaks: dict[str, _Peak] = {}
        self._phases: list[str] = []
        self._largest: LargestTensor | None = None
        self._parameters: list[torch.nn.Parameter] = []
        self._hooks = ExitStack()
        self.num_changes = 0

    def __enter__(self) -> Self:
        self._hooks.enter_context(observe_storages(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()
        for entry in self._entries.values():
            self._consider_largest(entry)
        self._entries.clear()  # destroys the weak references: nothing is called back any more
        self._saved.clear()

    # What a step tells.

    def enter_phase(self, name: str) -> None:
        """Begins a stretch of phase ``name``; inside another phase's stretch, that one pauses."""
        self._phases.append(name)
        self._point_peak()

    def exit_phase(self, name: str) -> None:
        """Ends the stretch."""
        assert self._phases[-1:] == [name], f"phase {name} ends inside {self._phases}"
        self._declare_gradients()
        self._phases.pop()
        self._point_peak()

    def tag(self, part: str, tensors: Iterable[torch.Tensor]) -> None:
        """Declares the part of the storages of ``tensors``.

        Raises:
            ValueError: there is no such part.
        """
        if part not in _INDEX:
            raise ValueError(unknown("part", part, PARTS))
        index = _INDEX[part]
        for tensor in tensors:
            for entry in self._entries_of(tensor, None):
                if not entry.declared:
                    entry.declared = True
                    self._move(entry, index)
                    self._refresh_peak()

    def track_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Declares the gradients of ``parameters``, those that exist and those to come. Only inside the ``with``."""
        for parameter in parameters:
            self._parameters.append(parameter)
            handle = parameter.register_post_accumulate_grad_hook(self._declare_gradient)  # type: ignore[no-untyped-call]
            self._hooks.callback(handle.remove)
        self._declare_gradients()

    # What it answers.

    @property
    def total_bytes(self) -> int:
        """Bytes that live now."""
        return self._total

    @property
    def parts(self) -> dict[str, int]:
        """Bytes that live now, by part."""
        return dict(zip(PARTS, self._parts, strict=True))

    @property
    def peaks(self) -> dict[str, Snapshot]:
        """For each phase, over all its stretches: the moment of its highest total."""
        return {name: peak.snapshot() for name, peak in self._peaks.items()}

    @property
    def peak(self) -> Snapshot:
        """The moment of the highest total, inside phases and outside."""
        return max((self._outside, *self._peaks.values()), key=lambda peak: peak.total).snapshot()

    @property
    def peak_phase(self) -> str | None:
        """The phase with the highest total: the first of equals; ``None`` before the first phase."""
        return max(self._peaks, key=lambda name: self._peaks[name].total, default=None)

    @property
    def largest(self) -> LargestTensor | None:
        """The largest single storage that is no model part, among those that died or lived at the ledger's end."""
        return self._largest

    def live_storages(self) -> dict[int, int]:
        """Bytes by storage (its address) of all that lives now."""
        return {key: entry.num_bytes for key, entry in self._entries.items()}

    # What the watch reports (see watching.py). Every op of a step comes through here.

    def on_tensor(self, tensor: torch.Tensor, op: object) -> None:
        """Counts the storage of ``tensor`` if it is new: an output of ``op``, or an input that was made before."""
        try:
            known = tensor.untyped_storage()._cdata in self._entries
        except NotImplementedError:  # a sparse or an opaque tensor
            return
        if not known:
            self._entries_of(tensor, op)

    def on_write(self, tensor: torch.Tensor) -> None:
        """Looks whether an op that writes into ``tensor`` gave it another storage, or its storage another size."""
        for entry in self._entries_of(tensor, None):
            storage = entry()
            if storage is not None and self._size(storage) != entry.num_bytes:
                entry.shape = tensor.shape
                self._resize(entry, self._size(storage))

    def on_resize(self, storage: torch.UntypedStorage) -> None:
        """Takes the new size of a storage that was resized by no op."""
        entry = self._entries.get(storage._cdata)
        if entry is not None and self._size(storage) != entry.num_bytes:
            self._resize(entry, self._size(storage))

    def on_save(self, tensor: torch.Tensor, alias: torch.Tensor) -> None:
        """Counts a saved reference to the storage of ``tensor`` for as long as ``alias``, a view of it, lives."""
        for entry in self._entries_of(tensor, None):
            ref = _SavedRef(alias, self._released)
            ref.entry = entry
            self._saved[id(ref)] = ref
            entry.num_saved += 1
            if entry.num_saved == 1 and not entry.declared:
                self._move(entry, _ACTIVATIONS)
                self._refresh_peak()

    # Bookkeeping. The sums are plain integers: a callback may come in any thread, but between two byte codes only.

    def _entries_of(self, tensor: torch.Tensor, op: object) -> list[_Entry]:
        """The entries of the storages under ``tensor``, made now if need be; none on another device."""
        if tensor.layout is not torch.strided:
            return []
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            return [entry for name in names for entry in self._entries_of(getattr(tensor, name), op)]
        storage = tensor.untyped_storage()
        entry = self._entries.get(storage._cdata)
        if entry is None:
            device = tensor.device
            if device.type != self._device.type or self._device.index not in (None, device.index):
                return []
            entry = self._add(storage, tensor.shape, op)
        return [entry]

    def _add(self, storage: torch.UntypedStorage, shape: torch.Size, op: object) -> _Entry:
        entry = _Entry(storage, self._died)
        entry.key = storage._cdata
        entry.num_bytes = self._size(storage)
        entry.part, entry.declared, entry.num_saved = _TEMPORARY, False, 0
        entry.shape, entry.op = shape, op
        self._entries[entry.key] = entry
        self._grow(entry, entry.num_bytes)
        return entry

    def _size(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self._block_bytes) * self._block_bytes

    def _died(self, entry: _Entry) -> None:
        self._consider_largest(entry)
        del self._entries[entry.key]
        self._grow(entry, -entry.num_bytes)
        entry.num_bytes = 0  # a saved reference may be released after it

    def _resize(self, entry: _Entry, num_bytes: int) -> None:
        """The old memory is freed after the new has been made and filled, so for a moment both are there."""
        self._consider_largest(entry)
        self._grow(entry, num_bytes)
        self._grow(entry, -entry.num_bytes)
        entry.num_bytes = num_bytes

    def _released(self, ref: _SavedRef) -> None:
        del self._saved[id(ref)]
        entry = ref.entry
        entry.num_saved -= 1
        if entry.num_saved == 0 and not entry.declared:
            self._move(entry, _TEMPORARY)

    def _grow(self, entry: _Entry, num_bytes: int) -> None:
        self._parts[entry.part] += num_bytes
        self._total += num_bytes
        if self._total > self._peak.total:
            self._peak.take(self._total, self._parts, self.num_changes + 1)
        self._changed()

    def _move(self, entry: _Entry, part: int) -> None:
        self._parts[entry.part] -= entry.num_bytes
        self._parts[part] += entry.num_bytes
        entry.part = part
        self._changed()

    def _changed(self) -> None:
        self.num_changes += 1
        if self._on_change is not None:
            self._on_change(self._parts)

    def _refresh_peak(self) -> None:
        """A tensor gets its name just after it was made: the peak that it caused should call it by that name."""
        if self._total == self._peak.total:
            self._peak.take(self._total, self._parts, self.num_changes)

    def _point_peak(self) -> None:
        """Lets the innermost phase's peak be the one that grows, from what lives now."""
        self._peak = self._peaks.setdefault(self._phases[-1], _Peak()) if self._phases else self._outside
        if self._total > self._peak.total:
            self._peak.take(self._total, self._parts, self.num_changes)

    def _declare_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.tag(PARTS[_GRADIENTS], (parameter.grad,))

    def _declare_gradients(self) -> None:
        for parameter in self._parameters:
            self._declare_gradient(parameter)

    def _consider_largest(self, entry: _Entry) -> None:
        if entry.part not in _MODEL and (self._largest is None or entry.num_bytes > self._largest.num_bytes):
            op = None if entry.op is None else str(entry.op)
            self._largest = LargestTensor(num_bytes=entry.num_bytes, shape=tuple(entry.shape), op=op)
