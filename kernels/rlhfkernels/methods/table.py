"""The methods, as role tables, and everything that is derived from a table.

A *weight set* is (base, adapter set). Each role of a method names its weight set, the head that reads it and what of it
is trained; how many bases are loaded, which forward passes a step needs, which phases it has and which weights get
gradients all follow. Adding a method is adding a row to ``METHODS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal, TypeVar

from rlhfkernels.errors import CaseError
from rlhfkernels.naming import unknown

T = TypeVar("T")
HeadName = Literal["lm", "value", "reward"]
RoleName = Literal["actor", "reference", "critic", "reward"]
Part = Literal["base", "adapter", "head"]
Origin = Literal["policy", "reward"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """What one role of a method is made of.

    Attributes:
        base: the name of the base weights it reads.
        adapter: the name of the adapter set that is switched on, or ``None`` for the bare base.
        head: ``lm`` (next-token logits, shared with its base), ``value`` or ``reward`` (one scalar a position).
        trains: which of its parts are trained.
    """

    base: str
    adapter: str | None = None
    head: HeadName
    trains: frozenset[Part] = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One trunk forward with one weight set, feeding the heads of every role in ``roles``."""

    base: str
    adapter: str | None
    roles: tuple[RoleName, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A named part of a step; ``kind`` says in which latency column of the papers' tables it is counted."""

    name: str
    kind: Literal["inference", "update"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A way to train.

    Attributes:
        name: the name users give it.
        title: the name reports print.
        origins: for each base, the pre-trained weights that it starts from. Bases of one origin start equal.
        roles: the role table, in the order actor, reference, critic, reward.
    """

    name: str
    title: str
    origins: dict[str, Origin]
    roles: dict[RoleName, Role]

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
    def trained_roles(self) -> tuple[RoleName, ...]:
        """The roles of which something is trained."""
        return tuple(name for name, role in self.roles.items() if role.trains)

    @property
    def score_passes(self) -> tuple[Pass, ...]:
        """The passes of ``score``. The actor needs none: its log-probabilities were kept while sampling."""
        return self._passes(name for name in self.roles if name != "actor")

    @property
    def update_passes(self) -> tuple[Pass, ...]:
        """The passes that are differentiated, one graph each; roles of one weight set share theirs."""
        return self._passes(self.trained_roles)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of a step in their order."""
        return (
            Phase(name="generate", kind="inference"),
            Phase(name="score", kind="inference"),
            *(Phase(name=update_phase(p), kind="update") for p in self.update_passes),
            Phase(name="optimize", kind="update"),
        )

    def heads_of(self, base: str) -> tuple[HeadName, ...]:
        """The heads that roles read from ``base``. A base without ``lm`` is loaded without a language-model head."""
        return _unique(role.head for role in self.roles.values() if role.base == base)

    def with_frozen_critic_head(self) -> Method:
        """The same method with the critic reading the reward head, frozen and shared (the paper's code line)."""
        critic = self.roles["critic"]
        shares = critic.base == self.roles["reward"].base
        frozen = dataclasses.replace(critic, head="reward" if shares else critic.head, trains=critic.trains - {"head"})
        return dataclasses.replace(self, roles={**self.roles, "critic": frozen})

    def _passes(self, names: Iterable[RoleName]) -> tuple[Pass, ...]:
        groups: dict[tuple[str, str | None], list[RoleName]] = {}
        for name in names:
            role = self.roles[name]
            groups.setdefault((role.base, role.adapter), []).append(name)
        return tuple(Pass(base=b, adapter=a, roles=tuple(roles)) for (b, a), roles in groups.items())


def update_phase(update_pass: Pass) -> str:
    """The phase in which a pass is differentiated: ``update_actor``, or ``update_actor_critic`` for a shared graph."""
    return "_".join(("update", *update_pass.roles))


def find_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        CaseError: there is none; the message has the nearest names.
    """
    if name not in METHODS:
        raise CaseError([unknown("method", name, METHODS)])
    return METHODS[name]


def _unique(items: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(items))


_WHOLE: frozenset[Part] = frozenset({"base", "head"})
_LORA: frozenset[Part] = frozenset({"adapter"})
_LORA_AND_HEAD: frozenset[Part] = frozenset({"adapter", "head"})

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="full",
            title="PPO",
            origins={"policy": "policy", "reference": "policy", "value": "reward", "reward": "reward"},
            roles={
                "actor": Role(base="policy", head="lm", trains=_WHOLE),
                "reference": Role(base="reference", head="lm"),
                "critic": Role(base="value", head="value", trains=_WHOLE),
                "reward": Role(base="reward", head="reward"),
            },
        ),
        Method(
            name="lora",
            title="LoRA-PPO",
            origins={"policy": "policy", "reference": "policy", "value": "reward", "reward": "reward"},
            roles={
                "actor": Role(base="policy", adapter="actor", head="lm", trains=_LORA),
                "reference": Role(base="reference", head="lm"),
                "critic": Role(base="value", adapter="critic", head="value", trains=_LORA_AND_HEAD),
                "reward": Role(base="reward", head="reward"),
            },
        ),
        Method(
            name="dynamic-lora",
            title="Dynamic-LoRA-PPO",
            origins={"policy": "policy", "reward": "reward"},
            roles={
                "actor": Role(base="policy", adapter="actor", head="lm", trains=_LORA),
                "reference": Role(base="policy", head="lm"),
                "critic": Role(base="reward", adapter="critic", head="value", trains=_LORA_AND_HEAD),
                "reward": Role(base="reward", head="reward"),
            },
        ),
        Method(
            name="joined-hydra",
            title="J-Hydra-PPO",
            origins={"hydra": "policy"},
            roles={
                "actor": Role(base="hydra", adapter="joint", head="lm", trains=_LORA),
                "reference": Role(base="hydra", head="lm"),
                "critic": Role(base="hydra", adapter="joint", head="value", trains=_LORA_AND_HEAD),
                "reward": Role(base="hydra", head="reward"),
            },
        ),
        Method(
            name="hydra",
            title="Hydra-PPO",
            origins={"hydra": "policy"},
            roles={
                "actor": Role(base="hydra", adapter="actor", head="lm", trains=_LORA),
                "reference": Role(base="hydra", head="lm"),
                "critic": Role(base="hydra", adapter="critic", head="value", trains=_LORA_AND_HEAD),
                "reward": Role(base="hydra", head="reward"),
            },
        ),
    )
}
