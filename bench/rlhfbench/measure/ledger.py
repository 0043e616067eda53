"""The ledger: every live byte of a device, by memory part and by phase.

The ledger sums tensor storages. A storage counts once, whole, from the op that made it until it is freed, however many
views share it. The sum is exact on any device, and on fake tensors too. Memory without a tensor is not counted: scratch
memory inside one op, the allocator's rounding, library workspaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from rlhfbench.measure.attribution import state_tensors, weights_by_part
from rlhfbench.measure.lifetimes import Lifetime
from rlhfbench.measure.storages import LiveStorages
from rlhfbench.measure.tally import LargestTensor, Snapshot, Tally
from rlhfbench.measure.tensor_hooks import observe_storages
from rlhfkernels.naming import unknown
from rlhfkernels.observer import PARTS, Observer

ACTIVATION_PARTS = ("kv_cache", "activations", "gathered", "buckets", "temporary")

# Allocation granularity: torch's CUDA caching allocator rounds every request up to 512 bytes. CPU: bytes.
_BLOCK_BYTES = {"cuda": 512}
_GRADIENTS, _OPTIMIZER = PARTS.index("gradients"), PARTS.index("optimizer")
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def block_bytes(device: str) -> int:
    """Returns the size in bytes of the blocks that the allocator of ``device`` hands out."""
    return _BLOCK_BYTES.get(torch.device(device).type, 1)


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
        counted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._tally = Tally(on_change) if tally is None else tally
        self._storages = LiveStorages(counted, self._tally, block_bytes, on_lifetime)
        self._parameters: list[torch.nn.Parameter] = []
        self._hooks = ExitStack()
        self._tracks = self._was_entered = False

    def __enter__(self) -> Self:
        if self._was_entered:
            raise RuntimeError("A Ledger counts one block: make a new one for the next.")
        self._was_entered = True
        self._hooks.enter_context(observe_storages(self._storages))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()
        self._storages.close()

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
        if part not in PARTS:
            raise ValueError(unknown("part", part, PARTS))
        self._storages.declare(PARTS.index(part), tensors)

    def track(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Attributes the weights of ``model``, their gradients, and the states of every optimizer that steps.

        Weights of PEFT layers are ``adapters``; the output embedding and a head called ``score``, ``classifier`` or
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
            self._storages.declare(PARTS.index(part), (tensor,), in_peaks=True)
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

    def _declare_states(self, optimizer: torch.optim.Optimizer) -> None:
        self._storages.declare(_OPTIMIZER, state_tensors(optimizer.state), in_peaks=True)

    def _declare_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            # A weight's gradient is made, and may make the peak, before the hook that names it runs. Steps that report
            # to an observer keep the parts of that moment, as their recorded figures do.
            self._storages.declare(_GRADIENTS, (parameter.grad,), in_peaks=self._tracks)

    def _declare_gradients(self) -> None:
        for parameter in self._parameters:
            self._declare_gradient(parameter)
