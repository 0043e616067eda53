"""The parts of a method: weight sets, roles, a data source and a program of stages."""

from __future__ import annotations

import dataclasses
from typing import Literal

Part = Literal["base", "adapter", "head"]
Origin = Literal["policy", "reward"]
SourceName = Literal["prompts", "demonstrations", "pairs"]

# Sequences in one data row, before anything is generated.
SEQUENCES_PER_ROW: dict[SourceName, int] = {"prompts": 1, "demonstrations": 1, "pairs": 2}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A head on a trunk's last hidden states.

    Attributes:
        outputs: next-token logits over the vocabulary, or one scalar a position.
        copy_of: the head that it starts as a copy of; ``None`` starts it from the model or at random.
    """

    outputs: Literal["vocabulary", "scalar"]
    copy_of: str | None = None


HEADS: dict[str, Head] = {
    "lm": Head(outputs="vocabulary"),
    "reward": Head(outputs="scalar"),
    "value": Head(outputs="scalar", copy_of="reward"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class WeightSet:
    """Base weights with one adapter set switched on, or with none."""

    base: str
    adapter: str | None = None

    @property
    def key(self) -> str:
        """The name of the differentiated pass over it: there is one at most."""
        return self.base if self.adapter is None else f"{self.base}.{self.adapter}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """One role of a method.

    Attributes:
        base: name of the base weights that it reads.
        adapter: name of the adapter set that is switched on, or ``None`` for the bare base.
        head: a name in ``HEADS``.
        trains: its trained parts.
    """

    base: str
    adapter: str | None = None
    head: str
    trains: frozenset[Part] = frozenset()

    @property
    def weights(self) -> WeightSet:
        """The weight set of its forward pass."""
        return WeightSet(self.base, self.adapter)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Generate:
    """Samples completions and keeps their log-probabilities in the column ``old_logprobs``.

    Attributes:
        role: the role that samples.
        samples: dotted name of the option that holds the samples per prompt; ``None`` is one.
    """

    role: str
    samples: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """Reads a quantity without a graph into a column of the batch.

    Attributes:
        role: the role that is read.
        quantity: a name in ``rlhfkernels.training.quantities.QUANTITIES``.
        into: the column.
        when: dotted name of the option that must be true; ``None`` always reads.
        once: dotted name of the option that makes it a ``Prepare``; ``None`` reads in every step.
    """

    role: str
    quantity: str
    into: str
    when: str | None = None
    once: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prepare(Read):
    """Reads a quantity of the whole data set, once, before the first step; attributes as in ``Read``."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Derive:
    """Computes columns of the batch from others.

    Attributes:
        function: a name in ``rlhfkernels.algorithms.DERIVATIONS``.
    """

    function: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """Adds the gradient of an objective to a role's trained weights.

    Attributes:
        role: the role that is read with a graph.
        objective: a name in ``rlhfkernels.algorithms.OBJECTIVES``.
    """

    role: str
    objective: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Optimize:
    """Clips the gradients of a role's weights and runs its optimizer.

    Attributes:
        role: the role that owns the weights. Weights that two roles train belong to the first.
        learning_rate: dotted name of the option with its peak learning rate; where that is absent or ``None``, it is
            ``optimizer.learning_rate``.
    """

    role: str
    learning_rate: str | None = None


Stage = Generate | Read | Derive | Update | Optimize
