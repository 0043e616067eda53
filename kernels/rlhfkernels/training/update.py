"""The update phases of a step: mini-batches, their gradients, and the optimizers' steps."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

import torch

from rlhfkernels.algorithms.common import Counts, Loss
from rlhfkernels.config.case import Case
from rlhfkernels.data.batch import Batch, chunks
from rlhfkernels.engine.engine import Engine
from rlhfkernels.methods.phases import ForwardPass
from rlhfkernels.methods.program import Optimize
from rlhfkernels.observer import Observer
from rlhfkernels.parallel.strategies import RoleOptimizer
from rlhfkernels.parallel.world import World
from rlhfkernels.training.gradients import PassForm, add_gradients, read_losses
from rlhfkernels.training.stats import ObjectiveStatistics, StepStats


class UpdatePhases:
    """The update phases of a step, with the order of the data rows.

    Args:
        case: what is run.
        engine: the models.
        world: the ranks that share the case.

    Attributes:
        lengths_differ: the sequences of the ranks may have different lengths. Where every sequence has the case's
            lengths, no rank need ask the others for theirs.
    """

    def __init__(self, case: Case, engine: Engine, world: World) -> None:
        self._case, self._engine, self._world = case, engine, world
        self._phases = [phase for phase in engine.method.phases if phase.kind == "update"]
        self._order = random.Random(case.seed)
        self._is_first = True
        may_stop = engine.method.generate is not None and case.options.rollout.stop_token_id is not None
        self.lengths_differ = case.data_file is not None or may_stop

    def run(self, batch: Batch, observer: Observer, stats: StepStats, optimizers: Mapping[str, RoleOptimizer]) -> None:
        """Trains on every epoch's mini-batches, one graph at a time, with an optimizer step after each.

        Args:
            batch: with the columns that the objectives read.
            observer: told of the phases.
            stats: gets the statistics: in the first step those of all ranks; see ``StepStats``.
            optimizers: by role.
        """
        if not self._phases:
            return
        is_first_step, self._is_first = self._is_first, False
        whole = self._first_statistics(batch, observer) if is_first_step else None
        for _ in range(self._case.num_epochs):
            for indices in self.mini_batches():
                stats.grad_norms = {}
                found = ObjectiveStatistics()
                for phase in self._phases:
                    with observer.phase(phase.name):
                        for p in phase.passes:
                            for losses in self._losses(p, batch, indices, train=True):
                                found.add(losses)
                        for stage in phase.stages:
                            if isinstance(stage, Optimize) and stage.role in optimizers:
                                stats.grad_norms[stage.role] = optimizers[stage.role].step()
                if whole is None:  # the weights are still those that the columns were read with
                    whole = found
        assert whole is not None
        of_step = ObjectiveStatistics(found.losses, whole.sums, whole.maxima)
        if is_first_step and self._world.size > 1 and self._engine.with_weights:
            of_step = of_step.of_all_ranks(self._world)
        stats.losses = of_step.losses
        stats.metrics |= of_step.metrics

    @torch.no_grad()
    def _first_statistics(self, batch: Batch, observer: Observer) -> ObjectiveStatistics | None:
        """The objectives' statistics over the whole batch, before any weight moves; ``None`` if it is one mini-batch.

        Rows of later mini-batches are trained on after an optimizer step, so they need a forward pass of their own. It
        is run in the first step alone: later ones are timed.
        """
        if self._case.mini_batch_size == batch.num_rows or not self._engine.with_weights:
            return None
        found = ObjectiveStatistics()
        for phase in [phase for phase in self._phases if phase.passes]:
            with observer.phase(phase.name):
                for p in phase.passes:
                    for losses in self._losses(p, batch, range(batch.num_rows), train=False):
                        found.add(losses)
        return found

    def _losses(
        self, p: ForwardPass, batch: Batch, indices: Sequence[int], *, train: bool
    ) -> Iterator[list[tuple[str, Loss]]]:
        """The losses of one pass, each with its role, one micro-batch of ``indices`` at a time.

        With ``train``, their gradients have been added, and no graph is left.
        """
        form = PassForm(p, self._case.options)
        selected = batch.select(indices)
        tokens = (selected.predicted_mask if form.reads_prompt else selected.mask).sum()
        if self.lengths_differ and form.divides_by_tokens:
            # Gradients are averaged over ranks: the divisor is the mean of theirs.
            tokens = self._world.all_sum(tokens) / self._world.size
        counts = Counts(tokens=tokens, rows=len(indices))
        micro_batches = list(chunks(indices, self._case.micro_batch_size))
        for i, rows in enumerate(micro_batches):
            part = batch.select(rows)
            if train:
                losses = add_gradients(self._engine, form, part, counts, is_last=i == len(micro_batches) - 1)
            else:
                losses = read_losses(self._engine, form, part, counts)
            yield [(stage.role, loss) for stage, loss in zip(form.stages, losses, strict=True)]

    def mini_batches(self) -> Iterator[Sequence[int]]:
        """The data rows of every mini-batch of one epoch; shuffled only where there are several."""
        order: Sequence[int] = range(self._case.batch_size)
        size = self._case.mini_batch_size
        if size < len(order):
            order = self._order.sample(order, len(order))
        return chunks(order, size)
