"""Recordings: the changes that a step on fake tensors makes to its ledger, and the sizes that a plan reads from it."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from transformers import masking_utils

from rlhfbench.measure.ledger import Ledger, block_bytes
from rlhfbench.measure.memory import run_under_ledger
from rlhfbench.measure.tally import PHASE_CHANGES, Change, Recorder
from rlhfbench.planning.decode_steps import decode_steps_of, set_decode_steps
from rlhfbench.planning.divisions import division_of, fake_ranks
from rlhfbench.planning.fake_tensors import CachingFakeTensorMode
from rlhfbench.planning.optimizer_steps import GradientsWatch, Trained
from rlhfbench.planning.zero import Zero, trained_numels
from rlhfkernels.config.case import Case
from rlhfkernels.engine.logprob_chunk import logprob_chunk_size
from rlhfkernels.ops.dispatch import standing_for
from rlhfkernels.training.sizes import StepSizes
from rlhfkernels.training.step import TrainingStep, build_step


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """One step.

    Attributes:
        step: the step that ran, on fake tensors.
        stretches: the changes, cut before each beginning and each end of a phase; among them what a stand-in for
            DeepSpeed says of gradients (``rlhfbench.planning.partitions``).
        trained: what each stretch of optimizer steps began with, by the index of the stretch.
        sizes: of the step.
        numels: of the step, as ``trained_numels``.
    """

    step: TrainingStep
    stretches: list[list[Change]]
    trained: dict[int, Trained]
    sizes: StepSizes
    numels: dict[str, tuple[int, ...]]


def record_step(case: Case, num_layers: int | None = None, division: Zero | None = None) -> Recording:
    """Runs one step of ``case`` on fake tensors.

    The step runs with CPU tensors: fake tensors of another device need that device's build of torch for their
    backward; storages are counted in the blocks of the device that was asked for, and attention and decode steps are
    those of that device.

    Args:
        case: what to plan. A stop token changes no shape and is left out. A data file stands for one batch of random
            rows of full length with an attention mask, as short prompts have one. Triton is not run.
        num_layers: run the first layers of every model alone.
        division: how the step is divided among ranks; ``None`` is what the options of the case name.

    Raises:
        ModelError: the model's configuration cannot be read, or it is too short.
        CaseError: an option does not fit the model.
    """
    # The C backend takes its memory from torch, so a plan counts it; Triton cannot start without the device.
    backend = case.options.engine.backend if case.device == "cpu" else "torch"
    changed = {"rollout.stop_token_id": None, "engine.backend": backend, "engine.cuda_graphs": "off"}
    options = case.options.replace(changed)
    stand_in = dataclasses.replace(case, device="cpu", options=options)
    recorder = Recorder()
    ledger = Ledger("cpu", block_bytes=block_bytes(case.device), tally=recorder)
    division = division or division_of(case)
    with (
        fake_ranks(division, case.device) as world,
        division.stand_in(ledger.tag, recorder.changes.append, case.device) as make_strategy,
        _fake_tensors(case.seq_len),
        _no_collection(),
        standing_for(case.device),
    ):
        step = build_step(stand_in, with_weights=False, num_layers=num_layers, world=world, make_strategy=make_strategy)
        with step.engine.strategy.whole():
            sizes, numels = StepSizes.of(step), trained_numels(step)  # a step may free models that are counted here
        step.engine.logprob_chunk = logprob_chunk_size(case, step.engine.vocab_size)  # of the device asked for
        set_decode_steps(step, decode_steps_of(case, recorder, ledger))
        watch = GradientsWatch(step, ledger)
        run_under_ledger(step, ledger, watch)
        return Recording(
            step=step,
            stretches=_stretches(recorder.changes),
            trained=watch.found,
            sizes=sizes,
            numels=numels,
        )


@contextmanager
def _fake_tensors(seq_len: int) -> Iterator[None]:
    """Tensors made inside have shapes and no contents.

    Transformers looks into position ids for packed sequences, and where it cannot look, it makes a mask that it would
    not make of real ones. Here a row is packed if it is longer than ``seq_len``, the length of a sequence of the case.
    """
    find = masking_utils.find_packed_sequence_indices

    def found(position_ids: torch.Tensor) -> torch.Tensor | None:
        packed: torch.Tensor | None = find(position_ids) if position_ids.shape[-1] > seq_len else None
        return packed

    with mock.patch.object(masking_utils, "find_packed_sequence_indices", found), CachingFakeTensorMode():
        yield


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection, which would free tensors in reference cycles at any moment; a measured step has none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _stretches(changes: list[Change]) -> list[list[Change]]:
    stretches: list[list[Change]] = [[]]
    for change in changes:
        if change[0] in PHASE_CHANGES:
            stretches.append([])
        stretches[-1].append(change)
    return stretches
