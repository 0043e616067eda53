"""Optimizer steps at any depth: the real optimizers, on fake tensors of the shapes that a deep model trains.

An optimizer goes through the weights in chunks of some bytes, which need not end where a layer ends. So its changes at
a depth are recorded at that depth; only the list of its weights and gradients is extrapolated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable

import torch
from torch import nn

from rlhfbench.measure.ledger import Ledger
from rlhfbench.measure.tally import Change, Recorder
from rlhfbench.planning.depth import deepen
from rlhfbench.planning.fake_tensors import CachingFakeTensorMode
from rlhfkernels.config.options import OptimizerOptions
from rlhfkernels.methods.program import Optimize
from rlhfkernels.observer import Observer
from rlhfkernels.training.optimizer_table import make_optimizer
from rlhfkernels.training.optimizers import Optimizer
from rlhfkernels.training.step import TrainingStep


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Position of a tensor's elements in its storage: the arguments of ``as_strided``, and the dtype."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        """Returns the layout of ``tensor``."""
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)


@dataclasses.dataclass(frozen=True, slots=True)
class TrainedWeight:
    """A weight that an optimizer steps, and its gradient.

    Attributes:
        weight: layout of the weight.
        gradient: layout of the gradient; ``None`` if there is none.
        storage_bytes: size of the gradient's storage.
        shared_with: how many weights ago that storage came up last; 0 if it is new.
        outlives_step: the storage is not the gradient's alone, and the step frees no memory with the gradient.
    """

    weight: Layout
    gradient: Layout | None
    storage_bytes: int
    shared_with: int
    outlives_step: bool = False


# By role: the weights of its optimizer.
Trained = tuple[tuple[str, tuple[TrainedWeight, ...]], ...]


class GradientsWatch(Observer):
    """Passes a step's notifications on, and notes the gradients that each stretch of optimizer steps begins with.

    Args:
        step: the step.
        inner: notified first.

    Attributes:
        found: what each stretch begins with, by the number of phase boundaries up to its own.
    """

    def __init__(self, step: TrainingStep, inner: Observer) -> None:
        self._step, self._inner = step, inner
        self._stages = {phase.name: phase.stages for phase in step.phases}
        self._num_boundaries = 0
        self.found: dict[int, Trained] = {}

    def enter_phase(self, name: str) -> None:
        """Notes the gradients if the phase consists of optimizer steps."""
        self._inner.enter_phase(name)
        self._num_boundaries += 1
        if all(isinstance(stage, Optimize) for stage in self._stages[name]):
            kept = {tensor.untyped_storage()._cdata for _, tensor in self._step.engine.strategy.tensors()}
            found = tuple(
                (role, _trained(optimizer, kept))
                for role, optimizer in self._step.optimizers.items()
                if isinstance(optimizer, Optimizer)  # a stand-in goes weight by weight
            )
            if found:
                self.found[self._num_boundaries] = found

    def exit_phase(self, name: str) -> None:
        """Passes the call on."""
        self._inner.exit_phase(name)
        self._num_boundaries += 1

    def tag(self, part: str, tensors: Iterable[torch.Tensor]) -> None:
        """Passes the call on."""
        self._inner.tag(part, tensors)


def _trained(optimizer: Optimizer, kept: Collection[int]) -> tuple[TrainedWeight, ...]:
    last_use: dict[int, int] = {}
    found = []
    for i, weight in enumerate(optimizer.parameters):
        if weight.grad is None:
            found.append(TrainedWeight(Layout.of(weight), None, 0, 0))
            continue
        storage = weight.grad.untyped_storage()
        shared_with = i - last_use.get(storage._cdata, i)
        last_use[storage._cdata] = i
        gradient, outlives_step = Layout.of(weight.grad), storage._cdata in kept
        found.append(TrainedWeight(Layout.of(weight), gradient, storage.nbytes(), shared_with, outlives_step))
    return tuple(found)


def deepen_trained(shallow: Trained, deeper: Trained, times: int) -> Trained | None:
    """Returns what a deeper model trains; see ``deepen``."""
    found = []
    for (role, fewer), (same_role, more) in zip(shallow, deeper, strict=True):
        assert role == same_role
        weights = deepen(fewer, more, times)
        if weights is None:
            return None
        found.append((role, tuple(weights)))
    return tuple(found)


@functools.lru_cache(maxsize=4)  # cases that differ in their batch size alone share these
def record_optimizer_steps(options: OptimizerOptions, trained: Trained, block_bytes: int) -> list[Change]:
    """Returns the changes of one step of each optimizer.

    Fake tensors with recipes: a norm of a meta tensor takes 250 us, of one of these 15 us.

    Args:
        options: of the case.
        trained: the weights and gradients.
        block_bytes: as in ``Ledger``.
    """
    recorder = Recorder()
    with CachingFakeTensorMode():
        optimizers = [make_optimizer(options, _weights_of(weights), computes=False) for _, weights in trained]
        with Ledger("cpu", block_bytes=block_bytes, tally=recorder) as ledger:
            for optimizer in optimizers:
                ledger.tag("base", optimizer.parameters)  # no weight comes or goes: any part will do
                ledger.tag("gradients", [p.grad for p in optimizer.parameters if p.grad is not None])
                ledger.tag("optimizer", optimizer.tensors())
            kept = [
                weight.grad
                for optimizer, (_, weights) in zip(optimizers, trained, strict=True)
                for weight, each in zip(optimizer.parameters, weights, strict=True)
                if each.outlives_step
            ]
            start = len(recorder.changes)
            norms = [optimizer.step() for optimizer in optimizers]
            changes = recorder.changes[start:]
            del norms, kept  # alive until here, as in a training step
    return changes


def _weights_of(trained: tuple[TrainedWeight, ...]) -> list[nn.Parameter]:
    weights: list[nn.Parameter] = []
    for i, each in enumerate(trained):
        layout = each.weight
        weight = nn.Parameter(torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype))
        gradient = each.gradient
        if gradient is not None:
            if each.shared_with:
                shared = weights[i - each.shared_with].grad
                assert shared is not None
                storage = shared
            else:
                storage = torch.empty(each.storage_bytes // gradient.dtype.itemsize, dtype=gradient.dtype)
            weight.grad_dtype = gradient.dtype
            weight.grad = storage.as_strided(gradient.shape, gradient.stride, gradient.offset)
        weights.append(weight)
    return weights
