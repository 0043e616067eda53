"""The gradient of one forward pass over one micro-batch: jointly, packed, or in two passes.

Shapes: n = sequences, b = data rows, c = completion length.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from rlhfkernels.algorithms import OBJECTIVES, Objective
from rlhfkernels.algorithms.common import Counts, Loss, Reader
from rlhfkernels.config.options import Options
from rlhfkernels.data.batch import Batch
from rlhfkernels.engine.engine import Engine
from rlhfkernels.methods.phases import ForwardPass
from rlhfkernels.methods.program import Update
from rlhfkernels.training.quantities import GraphReader, LeafReader, PackedReader, predicting_positions


class PassForm:
    """Differentiation of a pass, as its objectives declare it under the options.

    Args:
        p: a pass of ``Update`` stages.
        options: of the case.

    Attributes:
        p: the pass.
        options: of the case.
        stages: the stages of the pass.
        objectives: their objectives, in the same order.
        reads_prompt: the loss covers the prompt's tokens too.
        packs: the sequences are one row without padding.
        in_two_passes: the sequences of a data row have one graph each.
        divides_by_tokens: a loss is divided by the number of tokens.
    """

    def __init__(self, p: ForwardPass, options: Options) -> None:
        self.p, self.options = p, options
        self.stages = tuple(stage for stage in p.stages if isinstance(stage, Update))
        self.objectives: tuple[Objective, ...] = tuple(OBJECTIVES[stage.objective] for stage in self.stages)
        self.reads_prompt = any(objective.reads_prompt(options) for objective in self.objectives)
        self.packs = any(objective.packs(options) for objective in self.objectives)
        self.in_two_passes = any(objective.in_two_passes(options) for objective in self.objectives)
        self.divides_by_tokens = any(objective.divides_by_tokens for objective in self.objectives)

    def positions(self, prompt_len: int, completion_len: int) -> range:
        """The positions of a sequence whose hidden states the pass reads."""
        read = predicting_positions(prompt_len, completion_len)
        return range(read.stop) if self.reads_prompt else read


def add_gradients(engine: Engine, form: PassForm, part: Batch, counts: Counts, *, is_last: bool) -> list[Loss]:
    """Adds the gradients of a pass over a micro-batch to the weights; its graph is gone on return.

    Args:
        engine: the models.
        form: the pass, and how it is differentiated.
        part: the micro-batch.
        counts: the divisors, of the whole mini-batch.
        is_last: the micro-batch is the last of its mini-batch.

    Returns:
        The loss of every stage of the pass, in order.
    """
    if form.in_two_passes:
        return _add_in_two_passes(engine, form, part, counts, is_last=is_last)
    losses: list[Loss] = []

    def forward() -> torch.Tensor:
        losses.extend(_losses(engine, form, part, counts, train=True))
        return _sum(losses)

    _backward(engine.train(form.p.weights, forward, is_last=is_last))
    return losses


def read_losses(engine: Engine, form: PassForm, part: Batch, counts: Counts) -> list[Loss]:
    """The loss of every stage of a pass over a micro-batch, without a graph; arguments as in ``add_gradients``."""
    return engine.read(form.p.weights, lambda: _losses(engine, form, part, counts))


def _losses(engine: Engine, form: PassForm, part: Batch, counts: Counts, *, train: bool = False) -> list[Loss]:
    """The loss of every stage of a pass over a micro-batch.

    Args:
        engine: the models.
        form: the pass.
        part: the micro-batch.
        counts: the divisors, of the whole mini-batch.
        train: whether a backward follows.
    """
    weights = form.p.weights
    readers: list[Reader]
    if form.packs:
        row = part.packed(reads_prompt=form.reads_prompt)
        hidden = engine.packed_hidden(weights, row, train=train)
        readers = [PackedReader(engine, stage.role, hidden, row, part) for stage in form.stages]
    else:
        start = 0 if form.reads_prompt else part.prompt_len - 1
        hidden = engine.hidden(weights, part.tokens, part.attention_mask, start=start, train=train)
        readers = [GraphReader(engine, stage.role, hidden, part) for stage in form.stages]
    return _losses_of(form, readers, part, counts)


def _losses_of(form: PassForm, readers: Sequence[Reader], part: Batch, counts: Counts) -> list[Loss]:
    return [
        objective.function(reader, part, form.options, counts)
        for objective, reader in zip(form.objectives, readers, strict=True)
    ]


def _sum(losses: list[Loss]) -> torch.Tensor:
    return torch.stack([loss.value for loss in losses]).sum()


def _backward(loss: torch.Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def _add_in_two_passes(engine: Engine, form: PassForm, part: Batch, counts: Counts, *, is_last: bool) -> list[Loss]:
    """Reads all log-probabilities without a graph, then the sequences of a data row one after the other with one.

    The loss is differentiated by the log-probabilities of the first pass, and the second passes that gradient on. A
    graph holds the activations of one sequence for each data row of the micro-batch.
    """
    weights, start = form.p.weights, part.prompt_len - 1

    def read(batch: Batch, *, train: bool = False) -> list[torch.Tensor]:
        hidden = engine.hidden(weights, batch.tokens, batch.attention_mask, start=start, train=train)
        return [engine.logprobs(stage.role, hidden, batch.completions)[0] for stage in form.stages]

    with torch.no_grad():
        leaves = [LeafReader(logprobs) for logprobs in engine.read(weights, lambda: read(part))]
    losses = _losses_of(form, leaves, part, counts)
    _backward(_sum(losses))
    per_row = part.num_sequences // part.num_rows

    def replayed(i: int) -> torch.Tensor:
        """A scalar with the loss's gradient in sequence ``i`` of every data row."""
        logprobs = read(part.sequence_of_rows(i), train=True)
        products = [(each * leaf.gradient[i::per_row]).sum() for each, leaf in zip(logprobs, leaves, strict=True)]
        return torch.stack(products).sum()

    for i in range(per_row):
        is_last_backward = is_last and i == per_row - 1
        _backward(engine.train(weights, functools.partial(replayed, i), is_last=is_last_backward))
    return losses
