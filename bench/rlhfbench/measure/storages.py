"""The live storages of a device: what each one is for, from the op that made it until it is freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rlhfbench.measure.lifetimes import Lifetime
from rlhfbench.measure.tally import MODEL_PARTS, Tally
from rlhfkernels.observer import PARTS

_MODEL = frozenset(map(PARTS.index, MODEL_PARTS))
_ACTIVATIONS, _GATHERED, _BUCKETS, _TEMPORARY = map(PARTS.index, ("activations", "gathered", "buckets", "temporary"))

# Methods that return the tensors of a sparse one, by layout.
_BY_ROWS, _BY_COLUMNS = ("crow_indices", "col_indices", "values"), ("ccol_indices", "row_indices", "values")
_COMPONENTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _BY_ROWS,
    torch.sparse_bsr: _BY_ROWS,
    torch.sparse_csc: _BY_COLUMNS,
    torch.sparse_bsc: _BY_COLUMNS,
}


class Entry(weakref.ref[torch.UntypedStorage]):
    """One live storage: a weak reference whose callback runs when the storage is freed.

    Attributes:
        key: Address of the storage, unique while it lives.
        part: Index into ``PARTS`` of the part that counts it now.
        declared: Whether the part was declared (and is final) or inferred.
        num_saved: Number of references to it that autograd holds.
        born: Event at which the storage was first counted.
        since: Event from which on the entry has had this part and this size.
    """

    __slots__ = ("born", "declared", "dtype", "key", "num_bytes", "num_saved", "op", "part", "shape", "since")

    key: int
    num_bytes: int
    part: int
    declared: bool
    num_saved: int
    shape: torch.Size
    dtype: torch.dtype
    op: Any
    born: int
    since: int


class _SavedRef(weakref.ref[object]):
    """One reference that autograd holds; its callback runs when autograd releases it."""

    __slots__ = ("entry",)

    entry: Entry


class LiveStorages:
    """The ledger's ``StorageObserver``: it counts each storage of a device once, whole, in one part.

    An undeclared storage counts as ``activations`` while autograd holds a saved reference to it, and as ``temporary``
    otherwise. Parts are given by their index in ``PARTS``.

    Args:
        device: Device whose storages are counted. Without an index: every device of that type.
        tally: Takes the sums.
        block_bytes: Each storage counts as a multiple of this size.
        on_lifetime: Called with each stretch of events in which a storage had one size and part, when it ends.

    Attributes:
        entries: The live storages, by address.
    """

    def __init__(
        self,
        device: torch.device,
        tally: Tally,
        block_bytes: int,
        on_lifetime: Callable[[Lifetime], None] | None,
    ) -> None:
        self._device, self._tally = device, tally
        self._block_bytes, self._on_lifetime = block_bytes, on_lifetime
        self.entries: dict[int, Entry] = {}
        self._saved: dict[int, _SavedRef] = {}

    def close(self) -> None:
        """Ends the lifetimes of all storages that live, and forgets them."""
        for entry in self.entries.values():
            self._consider_largest(entry)
            self._end_lifetime(entry, self._tally.num_changes + 1)
        self.entries.clear()  # a destroyed weak reference calls nothing back
        self._saved.clear()

    def declare(self, part: int, tensors: Iterable[torch.Tensor], *, in_peaks: bool = False) -> None:
        """Puts the storages of ``tensors`` into ``part`` for good; of a storage, the first declaration wins.

        Args:
            part: The part.
            tensors: Any number of them.
            in_peaks: Also in the peaks that they have been in as they are now.
        """
        for tensor in tensors:
            for entry in self._entries_of(tensor, None):
                if not entry.declared:
                    entry.declared = True
                    if in_peaks:
                        self._correct_peaks(entry, part)
                    self._move(entry, part)
                    self._tally.refresh_peak()

    # Every op comes through on_tensor: it must stay cheap.

    def on_tensor(self, tensor: torch.Tensor, op: object) -> None:
        """Counts the storage of ``tensor`` if it is new: an output of ``op``, or an input made before (``None``)."""
        try:
            known = tensor.untyped_storage()._cdata in self.entries
        except NotImplementedError:  # a sparse or an opaque tensor
            known = tensor.layout not in _COMPONENTS
        if not known:
            self._entries_of(tensor, op)

    def on_write(self, tensor: torch.Tensor) -> None:
        """Updates the storage of ``tensor`` and its size, which an op that writes into it may have changed."""
        for entry in self._entries_of(tensor, None):
            storage = entry()
            if storage is not None and self._size(storage) != entry.num_bytes:
                entry.shape = tensor.shape
                self._resize(entry, self._size(storage))

    def on_resize(self, storage: torch.UntypedStorage, num_bytes_before: int) -> None:
        """Updates the size of a storage that was resized by no op.

        Divided weights are gathered into storages that are empty in between: torch's ``fully_shard`` grows them again.
        """
        entry = self.entries.get(storage._cdata)
        if entry is None and num_bytes_before == 0 and self._is_ours(storage.device):
            entry = self._add(storage, torch.Size([storage.nbytes()]), torch.uint8, None)  # bytes: no tensor is at hand
            entry.declared = True
            self._move(entry, _GATHERED)
            self._tally.refresh_peak()
        elif entry is not None and self._size(storage) != entry.num_bytes:
            self._resize(entry, self._size(storage))

    def on_collective(self, op: object, tensors: Iterable[torch.Tensor]) -> None:
        """Counts what a collective reads and writes as ``gathered`` (an all-gather's) or ``buckets``.

        A gradient that lies in a bucket is declared later, and then counts as one.
        """
        gathers = "gather" in str(op)
        for tensor in tensors:
            for entry in self._entries_of(tensor, op):
                if not entry.declared:
                    entry.declared = gathers
                    self._move(entry, _GATHERED if gathers else _BUCKETS)
                    self._tally.refresh_peak()

    def on_save(self, tensor: torch.Tensor, saved: object) -> None:
        """Counts a saved reference to the storage of ``tensor`` for as long as ``saved`` lives."""
        for entry in self._entries_of(tensor, None):
            ref = _SavedRef(saved, self._released)
            ref.entry = entry
            self._saved[id(ref)] = ref
            entry.num_saved += 1
            if entry.num_saved == 1 and not entry.declared:
                self._move(entry, _ACTIVATIONS)
                self._tally.refresh_peak()

    # Bookkeeping. Sums are plain integers: weak reference callbacks come in any thread, but only between bytecodes.

    def _entries_of(self, tensor: torch.Tensor, op: object) -> list[Entry]:
        """Returns the entries of the storages of ``tensor``, new ones included; none on another device."""
        if is_traceable_wrapper_subclass(tensor):  # before its layout: that of a nested tensor is not strided
            names, _ = tensor.__tensor_flatten__()
            inner = [value for name in names if isinstance(value := getattr(tensor, name), torch.Tensor)]
            return [entry for each in inner for entry in self._entries_of(each, op)]
        if tensor.layout is not torch.strided:
            components = [getattr(tensor, name)() for name in _COMPONENTS.get(tensor.layout, ())]
            return [entry for each in components for entry in self._entries_of(each, op)]
        storage = tensor.untyped_storage()
        entry = self.entries.get(storage._cdata)
        if entry is None:
            if not self._is_ours(tensor.device):
                return []
            entry = self._add(storage, tensor.shape, tensor.dtype, op)
        return [entry]

    def _is_ours(self, device: torch.device) -> bool:
        return device.type == self._device.type and self._device.index in (None, device.index)

    def _add(self, storage: torch.UntypedStorage, shape: torch.Size, dtype: torch.dtype, op: object) -> Entry:
        entry = Entry(storage, self._died)
        entry.key = storage._cdata
        entry.num_bytes = self._size(storage)
        entry.part, entry.declared, entry.num_saved = _TEMPORARY, False, 0
        entry.shape, entry.dtype, entry.op = shape, dtype, op
        entry.born = entry.since = self._tally.num_changes + 1
        self.entries[entry.key] = entry
        self._tally.grow(entry.part, entry.num_bytes, entry)
        return entry

    def _size(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self._block_bytes) * self._block_bytes

    def _died(self, entry: Entry) -> None:
        self._consider_largest(entry)
        del self.entries[entry.key]
        self._tally.grow(entry.part, -entry.num_bytes, entry)
        self._end_lifetime(entry, self._tally.num_changes)
        entry.num_bytes = 0  # a saved reference may be released later

    def _resize(self, entry: Entry, num_bytes: int) -> None:
        """Counts old and new memory together for a moment: the old is freed after its content was copied."""
        self._consider_largest(entry)
        self._tally.grow(entry.part, num_bytes, entry)
        self._tally.grow(entry.part, -entry.num_bytes, entry)
        self._end_lifetime(entry, self._tally.num_changes)
        entry.num_bytes, entry.since = num_bytes, self._tally.num_changes

    def _released(self, ref: _SavedRef) -> None:
        del self._saved[id(ref)]
        entry = ref.entry
        entry.num_saved -= 1
        if entry.num_saved == 0 and not entry.declared and entry() is not None:
            self._move(entry, _TEMPORARY)

    def _move(self, entry: Entry, part: int) -> None:
        self._tally.move(entry.num_bytes, entry.part, part, entry)
        self._end_lifetime(entry, self._tally.num_changes)
        entry.part, entry.since = part, self._tally.num_changes

    def _correct_peaks(self, entry: Entry, part: int) -> None:
        """Moves ``entry`` to ``part`` in every peak since it has been as it is: there it counted with the same size.

        AdamW makes its states in the first ``step``, whose peak comes before ``step`` returns and the states are known.
        """
        for peak in (self._tally.outside, *self._tally.in_phases.values()):
            if peak.event >= entry.since:
                peak.parts[entry.part] -= entry.num_bytes
                peak.parts[part] += entry.num_bytes

    def _end_lifetime(self, entry: Entry, end_event: int) -> None:
        if self._on_lifetime is not None:
            stretch = (entry.part, entry.num_bytes, entry.born, entry.since, end_event)
            self._on_lifetime(Lifetime(*stretch, tuple(entry.shape), entry.dtype, entry.op))

    def _consider_largest(self, entry: Entry) -> None:
        if entry.part not in _MODEL:
            self._tally.consider_largest(entry.num_bytes, entry.shape, entry.op)
