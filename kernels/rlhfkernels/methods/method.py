"""A method as data, and everything derived from it.

Which forward passes a step needs, which phases it has, which weights get gradients and what Hydra-RLHF's Table 2 counts
are derived from roles and program, here and nowhere else.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rlhfkernels.methods.phases import ForwardPass, Phase, phases_of
from rlhfkernels.methods.program import (
    HEADS,
    SEQUENCES_PER_ROW,
    Generate,
    Origin,
    Prepare,
    Read,
    Role,
    SourceName,
    Stage,
)


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
        return tuple(dict.fromkeys(role.base for role in self.roles.values()))

    @property
    def num_static_models(self) -> int:
        """Hydra-RLHF Table 2, "# of Static Models": every loaded full model is counted, trained or not."""
        return len(self.bases)

    @property
    def adapter_sets(self) -> tuple[tuple[str, str], ...]:
        """(base, adapter) pairs; their number is Hydra-RLHF Table 2, "# of LoRA Weight Sets"."""
        return tuple(
            dict.fromkeys((role.base, role.adapter) for role in self.roles.values() if role.adapter is not None)
        )

    @property
    def trained_roles(self) -> tuple[str, ...]:
        """The roles that train something."""
        return tuple(name for name, role in self.roles.items() if role.trains)

    @property
    def trains_a_base(self) -> bool:
        """True where a base is trained whole."""
        return any("base" in role.trains for role in self.roles.values())

    @property
    def trained_bases(self) -> tuple[str, ...]:
        """The bases of which a weight of the trunk or of the language-model head is trained."""
        return tuple(
            dict.fromkeys(
                role.base
                for role in self.roles.values()
                if "base" in role.trains or ("head" in role.trains and HEADS[role.head].outputs == "vocabulary")
            )
        )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of a step, in order; see ``phases_of``."""
        return phases_of(self.program, self.roles)

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
        return tuple(dict.fromkeys(role.head for role in self.roles.values() if role.base == base))

    def with_options(self, options: dict[str, Any]) -> Method:
        """The method as ``options``, by dotted name, make it."""
        program = tuple(
            _as_asked(stage, options) if isinstance(stage, Read) else stage
            for stage in self.program
            if not isinstance(stage, Read) or stage.when is None or options[stage.when]
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


def _as_asked(stage: Read, options: dict[str, Any]) -> Read:
    """The stage, as a ``Prepare`` where its option says so."""
    if stage.once is None or not options[stage.once]:
        return stage
    return Prepare(role=stage.role, quantity=stage.quantity, into=stage.into, once=stage.once)
