"""The ledger: every live byte of a device, by memory part and by phase.

The ledger sums tensor storages. A storage counts once, whole, from the op that made it until it is freed, however many
views share it. The sum is exact on any device, and on fake tensors too. Memory without a tensor is not counted: scratch
memory inside one op, the allocator's rounding, library workspaces.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rlhfbench.measure.attribution import state_tensors, weights_by_part
from rlhfbench.measure.lifetimes import Lifetime
from rlhfbench.measure.tally import MODEL_PARTS, LargestTensor, Snapshot, Tally
from rlhfbench.measure.tensor_hooks import observe_storages
from rlhfkernels.naming import unknown
from rlhfkernels.observer import PARTS, Observer

ACTIVATION_PARTS = ("kv_cache", "activations", "gathered", "buckets", "temporary")

# Allocation granularity: torch's CUDA caching allocator rounds every request up to 512 bytes. CPU: bytes.
_BLOCK_BYTES = {"cuda": 512}
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))

_INDEX = {part: index for index, part in enumerate(PARTS)}
_MODEL = frozenset(_INDEX[part] for part in MODEL_PARTS)
_GRADIENTS, _OPTIMIZER, _ACTIVATIONS, _GATHERED, _BUCKETS, _TEMPORARY = (
    _INDEX[part] for part in ("gradients", "optimizer", "activations", "gathered", "buckets", "temporary")
)


def block_bytes(device: str) -> int:
    """Returns the size in bytes of the blocks that the allocator of ``device`` hands out."""
    return _BLOCK_BYTES.get(torch.device(device).type, 1)


class _Entry(weakref.ref[torch.UntypedStorage]):
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

    entry: _Entry


class Ledger(Observer):
    """Counts live tensor bytes by memory part inside a ``with`` block.

    ``track`` attributes a model's weights, their gradients and the optimizer states. ``tag`` attributes any other
    tensor; the first declaration of a storage wins and holds until the storage is freed. An undeclared storage counts
    as ``activations`` while autograd holds a saved reference to it, and as ``temporary`` otherwise. A ledger is also an
    ``Observer`` and can be handed to a training step of ``rlhfkernels``.

    Example:
        >>> model = torch.nn.Linear(256, 256)
        >>> with Ledger("cpu") as ledger:
        ...     ledger.track(model)
        ...     with ledger.phase("forward"):
        ...         loss = model(torch.ones(4, 256)).mean()
        ...     with ledger.phase("backward"):
        ...         loss.backward()
        >>> ledger.peak_phase, ledger.peak.parts["base"]  # in bytes
        ('backward', 263168)

    Args:
        device: Device whose storages are counted. Without an index: every device of that type. Default: ``cuda`` where
            it is available, else ``cpu``.
        on_change: Called after every change with the live bytes by part, in the order of ``PARTS``. The list is the
            ledger's own: copy it to keep it.
        block_bytes: Granularity: each storage counts as a multiple of this size, as an allocator hands it out.
        tally: Takes the sums, in place of a tally of the ledger's own that calls ``on_change``.
        on_lifetime: Called when a storage is freed, resized or moved to another part, and for all that live when the
            block ends, with the stretch of events that ended.
    """

    def __init__(
        self,
        device: str | torch.device | None = None,
        on_change: Callable[[Sequence[int]], None] | None = None,
        *,
        block_bytes: int = 1,
        tally: Tally | None = None,
        on_lifetime: Callable[[Lifetime], None] | None = None,
    ) -> None:
        self._on_lifetime = on_lifetime
        self._block_bytes = block_bytes
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._tally = Tally(on_change) if tally is None else tally
        self._entries: dict[int, _Entry] = {}
        self._saved: dict[int, _SavedRef] = {}
        self._parameters: list[torch.nn.Parameter] = []
        self._hooks = ExitStack()
        self._tracks = self._was_entered = False

    def __enter__(self) -> Self:
        if self._was_entered:
            raise RuntimeError("A Ledger counts one block: make a new one for the next.")
        self._was_entered = True
        self._hooks.enter_context(observe_storages(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()
        for entry in self._entries.values():
            self._consider_largest(entry)
            self._end_lifetime(entry, self.num_changes + 1)
        self._entries.clear()  # a destroyed weak reference calls nothing back
        self._saved.clear()

    def enter_phase(self, name: str) -> None:
        """Starts a stretch of phase ``name``; an enclosing phase pauses meanwhile."""
        self._tally.enter_phase(name)

    def exit_phase(self, name: str) -> None:
        """Ends the stretch."""
        self._declare_gradients()
        self._tally.exit_phase(name)

    def tag(self, part: str, tensors: Iterable[torch.Tensor]) -> None:
        """Declares that the storages of ``tensors`` belong to ``part``.

        Raises:
            ValueError: ``part`` is not one of ``PARTS``.
        """
        if part not in _INDEX:
            raise ValueError(unknown("part", part, PARTS))
        self._declare(_INDEX[part], tensors)

    def track(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Attributes the weights of ``model``, their gradients, and the states of every optimizer that steps.

        PEFT weights count as ``adapters``; the output embedding and a head called ``score``, ``classifier`` or
        ``v_head`` as ``heads``; all other parameters and buffers as ``base``. A head tied to the input embedding is
        ``base``. Gradients and optimizer states may be created later: any ``torch.optim.Optimizer`` that steps until
        the block ends is seen, also one that a trainer makes. Call it again after adding parameters.

        Args:
            model: Its weights may have been made inside the block; peaks are corrected for those.
            optimizer: Needed only where states exist already, as after loading a checkpoint.
        """
        if not self._tracks:
            self._tracks = True
            handle = register_optimizer_step_post_hook(lambda stepped, args, kwargs: self._declare_states(stepped))
            self._hooks.callback(handle.remove)
        for part, tensor in weights_by_part(model):
            self._declare(_INDEX[part], (tensor,), in_peaks=True)
        self.track_gradients(model.parameters())
        if optimizer is not None:
            self._declare_states(optimizer)

    def track_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Declares the gradients of ``parameters``, existing and future ones."""
        for parameter in parameters:
            self._parameters.append(parameter)
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(self._declare_gradient)  # type: ignore[no-untyped-call]
                self._hooks.callback(handle.remove)
        self._declare_gradients()

    @property
    def total_bytes(self) -> int:
        """Live bytes now."""
        return self._tally.total

    @property
    def num_changes(self) -> int:
        """Number of storages added, resized, moved between parts and freed so far."""
        return self._tally.num_changes

    @property
    def parts(self) -> dict[str, int]:
        """Live bytes now, by part."""
        return dict(zip(PARTS, self._tally.parts, strict=True))

    @property
    def peaks(self) -> dict[str, Snapshot]:
        """The highest moment of each phase, over all its stretches."""
        return self._tally.peaks

    def add_phases(self, earlier: Ledger) -> None:
        """Adds the phases of a ledger whose block ended before this one's began, and its largest tensor."""
        self._tally.add_phases(earlier._tally)

    @property
    def peak(self) -> Snapshot:
        """The highest moment, inside phases and outside."""
        return self._tally.peak

    @property
    def peak_phase(self) -> str | None:
        """The phase with the highest total, the first of equals; ``None`` before the first phase."""
        return self._tally.peak_phase

    @property
    def largest(self) -> LargestTensor | None:
        """The largest single storage that is no model part, among those freed so far or live when the block ended."""
        return self._tally.largest

    def summary(self) -> str:
        """Returns a text table of bytes by part, at the highest moment and at the highest of each phase.

        Parts that are empty at all of them are left out.
        """
        moments = [("peak", self.peak), *self.peaks.items()]
        unit, unit_bytes = next((row for row in _UNITS if row[1] <= self.peak.total_bytes), _UNITS[-1])
        rows = [
            [unit, *(name for name, _ in moments)],
            *(
                [part, *(f"{m.parts[part] / unit_bytes:.2f}" for _, m in moments)]
                for part in PARTS
                if any(m.parts[part] for _, m in moments)
            ),
            ["total", *(f"{m.total_bytes / unit_bytes:.2f}" for _, m in moments)],
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
        )

    # The calls of tensor_hooks.StorageObserver. Every op comes through on_tensor: it must stay cheap.

    def on_tensor(self, tensor: torch.Tensor, op: object) -> None:
        """Counts the storage of ``tensor`` if it is new: an output of ``op``, or an input made before (``None``)."""
        try:
            known = tensor.untyped_storage()._cdata in self._entries
        except NotImplementedError:  # a sparse or an opaque tensor
            return
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
        entry = self._entries.get(storage._cdata)
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

    def _entries_of(self, tensor: torch.Tensor, op: object) -> list[_Entry]:
        """Returns the entries of the storages of ``tensor``, new ones included; none on another device."""
        if tensor.layout is not torch.strided:
            return []
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            inner = [value for name in names if isinstance(value := getattr(tensor, name), torch.Tensor)]
            return [entry for each in inner for entry in self._entries_of(each, op)]
        storage = tensor.untyped_storage()
        entry = self._entries.get(storage._cdata)
        if entry is None:
            if not self._is_ours(tensor.device):
                return []
            entry = self._add(storage, tensor.shape, tensor.dtype, op)
        return [entry]

    def _is_ours(self, device: torch.device) -> bool:
        return device.type == self._device.type and self._device.index in (None, device.index)

    def _add(self, storage: torch.UntypedStorage, shape: torch.Size, dtype: torch.dtype, op: object) -> _Entry:
        entry = _Entry(storage, self._died)
        entry.key = storage._cdata
        entry.num_bytes = self._size(storage)
        entry.part, entry.declared, entry.num_saved = _TEMPORARY, False, 0
        entry.shape, entry.dtype, entry.op = shape, dtype, op
        entry.born = entry.since = self.num_changes + 1
        self._entries[entry.key] = entry
        self._tally.grow(entry.part, entry.num_bytes, entry)
        return entry

    def _size(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self._block_bytes) * self._block_bytes

    def _died(self, entry: _Entry) -> None:
        self._consider_largest(entry)
        del self._entries[entry.key]
        self._tally.grow(entry.part, -entry.num_bytes, entry)
        self._end_lifetime(entry, self.num_changes)
        entry.num_bytes = 0  # a saved reference may be released later

    def _resize(self, entry: _Entry, num_bytes: int) -> None:
        """Counts old and new memory together for a moment: the old is freed after its content was copied."""
        self._consider_largest(entry)
        self._tally.grow(entry.part, num_bytes, entry)
        self._tally.grow(entry.part, -entry.num_bytes, entry)
        self._end_lifetime(entry, self.num_changes)
        entry.num_bytes, entry.since = num_bytes, self.num_changes

    def _released(self, ref: _SavedRef) -> None:
        del self._saved[id(ref)]
        entry = ref.entry
        entry.num_saved -= 1
        if entry.num_saved == 0 and not entry.declared and entry() is not None:
            self._move(entry, _TEMPORARY)

    def _move(self, entry: _Entry, part: int) -> None:
        self._tally.move(entry.num_bytes, entry.part, part, entry)
        self._end_lifetime(entry, self.num_changes)
        entry.part, entry.since = part, self.num_changes

    def _declare(self, part: int, tensors: Iterable[torch.Tensor], *, in_peaks: bool = False) -> None:
        for tensor in tensors:
            for entry in self._entries_of(tensor, None):
                if not entry.declared:
                    entry.declared = True
                    if in_peaks:
                        self._correct_peaks(entry, part)
                    self._move(entry, part)
                    self._tally.refresh_peak()

    def _correct_peaks(self, entry: _Entry, part: int) -> None:
        """Moves ``entry`` to ``part`` in every peak since it has been as it is: there it counted with the same size.

        AdamW makes its states in the first ``step``, whose peak comes before ``step`` returns and the states are known.
        """
        for peak in (self._tally.outside, *self._tally.in_phases.values()):
            if peak.event >= entry.since:
                peak.parts[entry.part] -= entry.num_bytes
                peak.parts[part] += entry.num_bytes

    def _declare_states(self, optimizer: torch.optim.Optimizer) -> None:
        self._declare(_OPTIMIZER, state_tensors(optimizer.state), in_peaks=True)

    def _declare_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            # A weight's gradient is made, and may make the peak, before the hook that names it runs. Steps that report
            # to an observer keep the parts of that moment, as their recorded figures do.
            self._declare(_GRADIENTS, (parameter.grad,), in_peaks=self._tracks)

    def _declare_gradients(self) -> None:
        for parameter in self._parameters:
            self._declare_gradient(parameter)

    def _end_lifetime(self, entry: _Entry, end_event: int) -> None:
        if self._on_lifetime is not None:
            stretch = (entry.part, entry.num_bytes, entry.born, entry.since, end_event)
            self._on_lifetime(Lifetime(*stretch, tuple(entry.shape), entry.dtype, entry.op))

    def _consider_largest(self, entry: _Entry) -> None:
        if entry.part not in _MODEL:
            self._tally.consider_largest(entry.num_bytes, entry.shape, entry.op)
