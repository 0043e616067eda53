"""Methods as data: weight sets, roles, a data source and a program of stages, and everything derived from them.

A program is a tuple of stages. Which forward passes a step needs, which phases it has, which weights get gradients and
what Hydra-RLHF's Table 2 counts are derived from it, here and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar

T = TypeVar("T")
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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ForwardPass:
    """One trunk forward with one weight set, for every stage that reads it.

    Attributes:
        weights: the weight set.
        stages: ``Read`` or ``Update`` stages, in their order.
    """

    weights: WeightSet
    stages: tuple[Read, ...] | tuple[Update, ...]

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that share the pass, each once."""
        return _unique(stage.role for stage in self.stages)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A named part of a step.

    Attributes:
        name: as in records and reports.
        kind: the latency column of the papers' tables that it counts in. ``prepare`` runs once a data set and is no
            part of a step.
        stages: what it runs.
        passes: the forward passes of its ``Read`` and ``Update`` stages.
    """

    name: str
    kind: Literal["prepare", "inference", "update"]
    stages: tuple[Stage, ...] = ()
    passes: tuple[ForwardPass, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A way to train.

    Attributes:
        name: the name users give it.
        title: the name reports print.
        family: methods of one family compute the same and differ in who shares weights.
        origins: the pre-trained weights that each base starts from. Bases of one origin start equal.
        roles: the role table.
        source: the kind of data that a step reads.
        program: the stages of a step, in order.
        epochs: dotted name of the option with the epochs over one batch; ``None`` is one.
        mini_batches: dotted name of the option with the optimizer steps per epoch; ``None`` is one.
        same_work_as: a method that does the same work, though it holds other weights: reports take the difference of
            the two as the noise of a run.
    """

    name: str
    title: str
    family: str
    origins: dict[str, Origin]
    roles: dict[str, Role]
    source: SourceName
    program: tuple[Stage, ...]
    epochs: str | None = None
    mini_batches: str | None = None
    same_work_as: str | None = None

    @property
    def bases(self) -> tuple[str, ...]:
        """The base weights that are loaded, in the order of first use."""
        return _unique(role.base for role in self.roles.values())

    @property
    def num_static_models(self) -> int:
        """Hydra-RLHF Table 2, "# of Static Models": every loaded full model is counted, trained or not."""
        return len(self.bases)

    @property
    def adapter_sets(self) -> tuple[tuple[str, str], ...]:
        """(base, adapter) pairs; their number is Hydra-RLHF Table 2, "# of LoRA Weight Sets"."""
        return _unique((role.base, role.adapter) for role in self.roles.values() if role.adapter is not None)

    @property
    def trained_roles(self) -> tuple[str, ...]:
        """The roles that train something."""
        return tuple(name for name, role in self.roles.items() if role.trains)

    @property
    def trains_a_base(self) -> bool:
        """True where a base is trained whole."""
        return any("base" in role.trains for role in self.roles.values())

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of a step, in order.

        ``Read`` and ``Derive`` stages in a row are one phase, and so are ``Optimize`` stages. Each forward pass that is
        differentiated is a phase: only one graph exists at a time.
        """
        found: list[Phase] = []
        for kind, stages in _runs(self.program):
            found += _PHASES[kind](self, stages)
        return tuple(found)

    @property
    def score_passes(self) -> tuple[ForwardPass, ...]:
        """The forward passes without a graph, generation apart."""
        return tuple(p for phase in self.phases if phase.kind == "inference" for p in phase.passes)

    @property
    def update_passes(self) -> tuple[ForwardPass, ...]:
        """The forward passes that are differentiated."""
        return tuple(p for phase in self.phases if phase.kind == "update" for p in phase.passes)

    @property
    def prepare(self) -> Phase | None:
        """The phase that runs once a data set, where there is one."""
        return next((phase for phase in self.phases if phase.kind == "prepare"), None)

    @property
    def bases_of_steps(self) -> frozenset[str]:
        """The bases that a step reads once its data set is prepared."""
        roles = (getattr(stage, "role", None) for stage in self.program if not isinstance(stage, Prepare))
        return frozenset(self.roles[role].base for role in roles if role is not None)

    @property
    def generate(self) -> Generate | None:
        """The stage that samples, where there is one."""
        return next((stage for stage in self.program if isinstance(stage, Generate)), None)

    def sequences_per_row(self, options: dict[str, Any]) -> int:
        """Sequences of one data row: 2 for a preference pair, n where n completions are sampled.

        Args:
            options: by dotted name.
        """
        samples = 1 if self.generate is None or self.generate.samples is None else int(options[self.generate.samples])
        return SEQUENCES_PER_ROW[self.source] * samples

    def heads_of(self, base: str) -> tuple[str, ...]:
        """The heads that roles read from ``base``. A base without ``lm`` is loaded without a language-model head."""
        return _unique(role.head for role in self.roles.values() if role.base == base)

    def with_options(self, options: dict[str, Any]) -> Method:
        """The method as ``options``, by dotted name, make it."""
        program = tuple(
            _as_asked(stage, options) if isinstance(stage, Read) else stage
            for stage in self.program
            if not isinstance(stage, Read) or _is_on(stage, options)
        )
        method = dataclasses.replace(self, program=program)
        return method._with_frozen_copies() if options["ppo.critic_head"] == "frozen" else method

    def _with_frozen_copies(self) -> Method:
        """The same method with heads that start as copies frozen, and shared where original and copy share a base."""
        roles = {}
        for name, role in self.roles.items():
            original = HEADS[role.head].copy_of
            if original is not None:
                shares = original in self.heads_of(role.base)
                role = dataclasses.replace(role, head=original if shares else role.head, trains=role.trains - {"head"})
            roles[name] = role
        return dataclasses.replace(self, roles=roles)


def _is_on(stage: Read, options: dict[str, Any]) -> bool:
    return stage.when is None or bool(options[stage.when])


def _as_asked(stage: Read, options: dict[str, Any]) -> Read:
    """The stage, as a ``Prepare`` where its option says so."""
    if stage.once is None or not options[stage.once]:
        return stage
    return Prepare(role=stage.role, quantity=stage.quantity, into=stage.into, once=stage.once)


def _runs(program: Sequence[Stage]) -> list[tuple[type[Stage], tuple[Stage, ...]]]:
    """The program in runs of stages that belong together: a ``Derive`` belongs to the reads around it."""
    found: list[tuple[type[Stage], list[Stage]]] = []
    for stage in program:
        kind = Read if isinstance(stage, Derive) else type(stage)
        if not found or found[-1][0] is not kind:
            found.append((kind, []))
        found[-1][1].append(stage)
    return [(kind, tuple(stages)) for kind, stages in found]


def _generate_phases(method: Method, stages: tuple[Stage, ...]) -> list[Phase]:
    return [Phase(name="generate", kind="inference", stages=stages)]


def _read_phases(method: Method, stages: tuple[Stage, ...]) -> list[Phase]:
    return [Phase(name="score", kind="inference", stages=stages, passes=_passes(method, stages))]


def _prepare_phases(method: Method, stages: tuple[Stage, ...]) -> list[Phase]:
    return [Phase(name="prepare", kind="prepare", stages=stages, passes=_passes(method, stages))]


def _update_phases(method: Method, stages: tuple[Stage, ...]) -> list[Phase]:
    alone = len(method.trained_roles) == 1
    return [
        Phase(name="update" if alone else "_".join(("update", *p.roles)), kind="update", stages=p.stages, passes=(p,))
        for p in _passes(method, stages)
    ]


def _optimize_phases(method: Method, stages: tuple[Stage, ...]) -> list[Phase]:
    return [Phase(name="optimize", kind="update", stages=stages)]


_PHASES = {
    Generate: _generate_phases,
    Read: _read_phases,
    Prepare: _prepare_phases,
    Update: _update_phases,
    Optimize: _optimize_phases,
}


def _passes(method: Method, stages: Iterable[Stage]) -> tuple[ForwardPass, ...]:
    """Stages that read one weight set share a forward pass, at the place of the first."""
    groups: dict[WeightSet, list[Any]] = {}
    for stage in stages:
        if isinstance(stage, (Read, Update)):
            groups.setdefault(method.roles[stage.role].weights, []).append(stage)
    return tuple(ForwardPass(weights=weights, stages=tuple(found)) for weights, found in groups.items())


def _unique(items: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(items))
