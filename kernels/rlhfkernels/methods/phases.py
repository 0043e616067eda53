"""The phases of a step and their forward passes, derived from a method's program and roles."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rlhfkernels.methods.program import (
    Derive,
    Generate,
    Optimize,
    Prepare,
    Read,
    Role,
    Stage,
    Update,
    WeightSet,
)

Kind = Literal["prepare", "inference", "update"]
# Name and kind of the phase that stages of one type make; each forward pass of ``Update`` stages is a phase of its own.
_PHASES: dict[type[Stage], tuple[str, Kind]] = {
    Generate: ("generate", "inference"),
    Read: ("score", "inference"),
    Prepare: ("prepare", "prepare"),
    Optimize: ("optimize", "update"),
}


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
        return tuple(dict.fromkeys(stage.role for stage in self.stages))


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
    kind: Kind
    stages: tuple[Stage, ...] = ()
    passes: tuple[ForwardPass, ...] = ()


def phases_of(program: Sequence[Stage], roles: Mapping[str, Role]) -> tuple[Phase, ...]:
    """The phases of a program, in order.

    ``Read`` and ``Derive`` stages in a row are one phase, and so are ``Optimize`` stages. Each forward pass that is
    differentiated is a phase: only one graph exists at a time.
    """
    found: list[Phase] = []
    for stage_type, run in itertools.groupby(program, _type_of):
        stages = tuple(run)
        passes = _passes(stages, roles)
        if stage_type is Update:
            found += [Phase(name=_update_name(p, roles), kind="update", stages=p.stages, passes=(p,)) for p in passes]
        else:
            name, kind = _PHASES[stage_type]
            found.append(Phase(name=name, kind=kind, stages=stages, passes=passes))
    return tuple(found)


def _type_of(stage: Stage) -> type[Stage]:
    """The type of a stage; a ``Derive`` belongs to the reads around it."""
    return Read if isinstance(stage, Derive) else type(stage)


def _update_name(p: ForwardPass, roles: Mapping[str, Role]) -> str:
    """``update`` where one role is trained, else ``update_actor`` and the like."""
    num_trained = sum(bool(role.trains) for role in roles.values())
    return "update" if num_trained == 1 else "_".join(("update", *p.roles))


def _passes(stages: Iterable[Stage], roles: Mapping[str, Role]) -> tuple[ForwardPass, ...]:
    """Stages that read one weight set share a forward pass, at the place of the first."""
    groups: dict[WeightSet, list[Any]] = {}
    for stage in stages:
        if isinstance(stage, (Read, Update)):
            groups.setdefault(roles[stage.role].weights, []).append(stage)
    return tuple(ForwardPass(weights=weights, stages=tuple(found)) for weights, found in groups.items())
