"""The methods. A new method is a row here, its functions in ``rlhfkernels.algorithms``, and its test."""

from __future__ import annotations

from collections.abc import Iterable

from rlhfkernels.errors import CaseError
from rlhfkernels.methods.method import Method
from rlhfkernels.methods.program import Derive, Generate, Optimize, Origin, Part, Read, Role, Stage, Update
from rlhfkernels.naming import unknown

_WHOLE: frozenset[Part] = frozenset({"base", "head"})
_LORA: frozenset[Part] = frozenset({"adapter"})
_LORA_AND_HEAD: frozenset[Part] = frozenset({"adapter", "head"})

_WHOLE_POLICY = Role(base="policy", head="lm", trains=_WHOLE)
_LORA_POLICY = Role(base="policy", adapter="policy", head="lm", trains=_LORA)

_PPO: tuple[Stage, ...] = (
    Generate(role="actor"),
    Read(role="reference", quantity="logprobs", into="reference_logprobs"),
    Read(role="critic", quantity="values", into="old_values"),
    Read(role="critic", quantity="last_scalar", into="terminal_values", when="ppo.bootstrap_truncated"),
    Read(role="reward", quantity="last_scalar", into="scores"),
    Derive(function="advantages"),
    Update(role="actor", objective="policy"),
    Update(role="critic", objective="value"),
    Optimize(role="actor"),
    Optimize(role="critic", learning_rate="ppo.critic_learning_rate"),
)


def _ppo(
    name: str, title: str, origins: dict[str, Origin], *, same_work_as: str | None = None, **roles: Role
) -> Method:
    """A layout of PPO: the program is the same, who shares weights differs."""
    return Method(
        name=name,
        title=title,
        family="PPO",
        origins=origins,
        roles=roles,
        source="prompts",
        program=_PPO,
        epochs="ppo.num_ppo_epochs",
        mini_batches="ppo.num_mini_batches",
        same_work_as=same_work_as,
    )


def _dpo(name: str, title: str, **roles: Role) -> Method:
    """A layout of DPO: the reference is a second model, or the policy's base with the adapter off."""
    return Method(
        name=name,
        title=title,
        family="DPO",
        origins=dict.fromkeys((role.base for role in roles.values()), "policy"),
        roles=roles,
        source="pairs",
        program=(
            Read(
                role="reference",
                quantity="sequence_logprob",
                into="reference_logprobs",
                once="dpo.precompute_ref_log_probs",
            ),
            Update(role="policy", objective="pairs"),
            Optimize(role="policy"),
        ),
    )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _ppo(
            "full",
            "PPO",
            {"policy": "policy", "reference": "policy", "value": "reward", "reward": "reward"},
            actor=Role(base="policy", head="lm", trains=_WHOLE),
            reference=Role(base="reference", head="lm"),
            critic=Role(base="value", head="value", trains=_WHOLE),
            reward=Role(base="reward", head="reward"),
        ),
        _ppo(
            "lora",
            "LoRA-PPO",
            {"policy": "policy", "reference": "policy", "value": "reward", "reward": "reward"},
            actor=Role(base="policy", adapter="actor", head="lm", trains=_LORA),
            reference=Role(base="reference", head="lm"),
            critic=Role(base="value", adapter="critic", head="value", trains=_LORA_AND_HEAD),
            reward=Role(base="reward", head="reward"),
        ),
        _ppo(
            "dynamic-lora",
            "Dynamic-LoRA-PPO",
            {"policy": "policy", "reward": "reward"},
            same_work_as="lora",
            actor=Role(base="policy", adapter="actor", head="lm", trains=_LORA),
            reference=Role(base="policy", head="lm"),
            critic=Role(base="reward", adapter="critic", head="value", trains=_LORA_AND_HEAD),
            reward=Role(base="reward", head="reward"),
        ),
        _ppo(
            "joined-hydra",
            "J-Hydra-PPO",
            {"hydra": "policy"},
            actor=Role(base="hydra", adapter="joint", head="lm", trains=_LORA),
            reference=Role(base="hydra", head="lm"),
            critic=Role(base="hydra", adapter="joint", head="value", trains=_LORA_AND_HEAD),
            reward=Role(base="hydra", head="reward"),
        ),
        _ppo(
            "hydra",
            "Hydra-PPO",
            {"hydra": "policy"},
            actor=Role(base="hydra", adapter="actor", head="lm", trains=_LORA),
            reference=Role(base="hydra", head="lm"),
            critic=Role(base="hydra", adapter="critic", head="value", trains=_LORA_AND_HEAD),
            reward=Role(base="hydra", head="reward"),
        ),
        *(
            Method(
                name=name,
                title=title,
                family="SFT",
                origins={"policy": "policy"},
                roles={"policy": policy},
                source="demonstrations",
                program=(Update(role="policy", objective="demonstrations"), Optimize(role="policy")),
            )
            for name, title, policy in (("sft", "SFT", _WHOLE_POLICY), ("sft-lora", "LoRA-SFT", _LORA_POLICY))
        ),
        _dpo("dpo", "DPO", policy=_WHOLE_POLICY, reference=Role(base="reference", head="lm")),
        _dpo("dpo-lora", "LoRA-DPO", policy=_LORA_POLICY, reference=Role(base="policy", head="lm")),
        Method(
            name="best-of-n",
            title="Best-of-n",
            family="Best-of-n",
            origins={"policy": "policy", "reward": "reward"},
            roles={"policy": Role(base="policy", head="lm"), "reward": Role(base="reward", head="reward")},
            source="prompts",
            program=(
                Generate(role="policy", samples="best_of_n.num_generations"),
                Read(role="reward", quantity="last_scalar", into="scores"),
                Derive(function="best_of_n"),
            ),
        ),
    )
}
"""Every method by name, in the order of reports."""


def families() -> dict[str, list[str]]:
    """The names of the methods of each family, in the table's order."""
    found: dict[str, list[str]] = {}
    for method in METHODS.values():
        found.setdefault(method.family, []).append(method.name)
    return found


def select(names: Iterable[str]) -> list[str]:
    """The methods that ``names`` mean: rows, families (``PPO``, ``dpo``) and ``all``; a row wins over a family.

    Raises:
        CaseError: some name is neither; every such name is told.
    """
    by_family = {family.lower(): rows for family, rows in families().items()}
    found: list[str] = []
    problems: list[str] = []
    for name in names:
        if name in METHODS:
            found.append(name)
        elif name.lower() == "all":
            found += METHODS
        elif name.lower() in by_family:
            found += by_family[name.lower()]
        else:
            problems.append(unknown("method", name, [*METHODS, *families(), "all"]))
    if problems:
        raise CaseError(problems)
    return list(dict.fromkeys(found))
