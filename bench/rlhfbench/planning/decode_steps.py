"""Decode steps of a plan for an accelerator: those that the accelerator executes, on the plan's fake tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from rlhfbench.measure.ledger import Ledger
from rlhfbench.measure.tally import Recorder
from rlhfkernels.config.case import Case
from rlhfkernels.engine.fast.blocks import Blocks
from rlhfkernels.engine.fast.capture import Step
from rlhfkernels.engine.fast.decoding import MakeSteps
from rlhfkernels.engine.fast.graph_decode import GraphDecodeSteps
from rlhfkernels.engine.fast.row_decode import RowDecodeSteps
from rlhfkernels.engine.fast.trunk import FastTrunk
from rlhfkernels.models.cache import PreallocatedLayer
from rlhfkernels.training.step import TrainingStep

_MIB = 2**20
# torch's CUDA allocator reserves segments of 2 MiB for blocks of up to 1 MiB, of 20 MiB for blocks of up to 10 MiB, and
# for each larger block its size in multiples of 2 MiB (c10/core/AllocatorConfig.h).
_SEGMENTS = ((_MIB, 2 * _MIB), (10 * _MIB, 20 * _MIB), (float("inf"), 2 * _MIB))


def decode_steps_of(case: Case, recorder: Recorder, ledger: Ledger) -> MakeSteps | None:
    """Returns what makes the decode steps of the device of ``case``; ``None`` for a CPU, whose tensors a plan has.

    Args:
        case: what is planned.
        recorder: receives the changes of ``ledger``.
        ledger: counts the step.
    """
    if case.device == "cpu":
        return None
    capture = PlannedGraphs(recorder, ledger)

    def make(
        blocks: Blocks, adapter: str | None, x: torch.Tensor, caches: Sequence[PreallocatedLayer]
    ) -> RowDecodeSteps:
        if case.options.engine.cuda_graphs == "off" or blocks.are_gathered:
            return RowDecodeSteps(blocks, adapter, x, caches)
        return GraphDecodeSteps(blocks, adapter, x, caches, capture)

    return make


def set_decode_steps(step: TrainingStep, make_steps: MakeSteps | None) -> None:
    """Has the fast trunks of ``step`` make their decode steps by ``make_steps``.

    A function of its own, as a step may free a trunk that no local variable holds.
    """
    for trunk in step.engine.trunks.values():
        if isinstance(trunk, FastTrunk):
            trunk.make_steps = make_steps


class PlannedGraphs:
    """Stands for ``CudaGraphs``: runs a step as often, and holds as ``temporary`` what the graphs' pool would reserve.

    The pool is estimated: its blocks lie in segments by torch's rules, without gaps between them.

    Args:
        recorder: receives the changes of ``ledger``.
        ledger: told of the pool, which lives as long as this object.
    """

    def __init__(self, recorder: Recorder, ledger: Ledger) -> None:
        self._recorder, self._ledger = recorder, ledger
        self._held: list[torch.Tensor] = []

    def __call__(self, step: Step) -> Step:
        """Runs ``step`` as a capture does: once eagerly, then under the capture, whose memory is the pool's."""
        step()
        begin = len(self._recorder.changes)
        step()
        sizes = (change[2] for change in self._recorder.changes[begin:] if change[0] == "grow")
        more_bytes = pool_bytes(sizes) - sum(tensor.numel() for tensor in self._held)
        if more_bytes > 0:
            self._held.append(torch.empty(more_bytes, dtype=torch.uint8))
            self._ledger.tag("temporary", self._held)
        return _replay


def _replay() -> None:
    """A replay allocates nothing."""


def pool_bytes(changes: Iterable[int]) -> int:
    """Returns the bytes that a memory pool reserves for blocks that are allocated and freed.

    Args:
        changes: sizes of the blocks in their order, those of freed ones negative.
    """
    live, peaks = [0] * len(_SEGMENTS), [0] * len(_SEGMENTS)
    for change in changes:
        kind = next(i for i, (largest, _) in enumerate(_SEGMENTS) if abs(change) <= largest)
        live[kind] += change
        peaks[kind] = max(peaks[kind], live[kind])
    return sum(-(-peak // segment) * segment for peak, (_, segment) in zip(peaks, _SEGMENTS, strict=True))
