"""The weights of a case: its bases, their adapter sets, the scalar heads, and which of them are trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from rlhfkernels.config.case import Case, stop_token_problem, vocabulary_problem
from rlhfkernels.errors import CaseError
from rlhfkernels.methods.method import Method
from rlhfkernels.methods.program import HEADS, Origin
from rlhfkernels.models.adapters import Adapters
from rlhfkernels.models.cloning import clone_module
from rlhfkernels.models.heads import ScalarHead
from rlhfkernels.models.loading import LoadedModel, load_model
from rlhfkernels.seeding import seeded

# Bases of one origin start from equal weights, bases of different origins do not.
_ORIGIN_SEED: dict[Origin, int] = {"policy": 0, "reward": 1}
_ADAPTER_SEED, _HEAD_SEED = 1000, 2000


def load_bases(case: Case, method: Method, *, with_weights: bool, num_layers: int | None) -> dict[str, LoadedModel]:
    """Loads the bases of a method; of those that start equal, the first is loaded and the others are its copies.

    Args:
        case: names the models.
        method: of the case, with its options applied.
        with_weights: load real weights.
        num_layers: see ``load_model``.

    Raises:
        ModelError: a model cannot be loaded or is too short.
        CaseError: two models have different vocabularies, or theirs lacks the stop token.
    """
    models: dict[str, LoadedModel] = {}
    first_of: dict[tuple[Origin, bool], LoadedModel] = {}
    for base in method.bases:
        origin = method.origins[base]
        with_lm_head = "lm" in method.heads_of(base)
        first = first_of.get((origin, with_lm_head))
        if first is not None:
            models[base] = first.clone()
            continue
        first_of[origin, with_lm_head] = models[base] = load_model(
            case,
            seed=case.seed + _ORIGIN_SEED[origin],
            with_lm_head=with_lm_head,
            with_weights=with_weights,
            name=case.model_of(origin),
            num_layers=num_layers,
        )
    sizes = {case.model_of(method.origins[base]): model.vocab_size for base, model in models.items()}
    if len(set(sizes.values())) > 1:
        raise CaseError([vocabulary_problem(sizes)])
    # Not known before the model is read: of a GGUF file, and of a preset whose architecture has the size.
    name, size = next(iter(sizes.items()))
    problem = stop_token_problem(name, case.options.rollout.stop_token_id, size)
    if problem is not None and method.generate is not None:
        raise CaseError([problem])
    return models


def attach_adapters(case: Case, method: Method, models: Mapping[str, LoadedModel]) -> dict[str, Adapters]:
    """Adds to each base its adapter sets."""
    return {
        base: Adapters(
            case.model_of(method.origins[base]),
            model.trunk,
            [adapter for owner, adapter in method.adapter_sets if owner == base],
            rank=case.options.lora.r,
            scaling=case.options.lora.scaling,
            targets=case.options.lora.target_modules,
            dtype=getattr(torch, case.options.lora.dtype or case.dtype),
            seed=case.seed + _ADAPTER_SEED,
        )
        for base, model in models.items()
    }


def make_scalar_heads(case: Case, method: Method, models: Mapping[str, LoadedModel]) -> dict[str, ScalarHead]:
    """The scalar head of each role that reads one; roles that name one head share it."""
    made: dict[str, ScalarHead] = {}
    for role in method.roles.values():
        if HEADS[role.head].outputs == "scalar":
            _make_scalar_head(case, role.head, models[role.base].hidden_size, made)
    for head in made.values():
        head.requires_grad_(False)
    return {name: made[role.head] for name, role in method.roles.items() if role.head in made}


def _make_scalar_head(case: Case, name: str, hidden_size: int, made: dict[str, ScalarHead]) -> ScalarHead:
    """The head called ``name``: a copy with its own storage of the head that it starts from, or a new one."""
    if name not in made:
        original = HEADS[name].copy_of
        if original is not None:
            made[name] = clone_module(_make_scalar_head(case, original, hidden_size, made))
        else:
            device = torch.device(case.device)
            with seeded(device, case.seed + _HEAD_SEED):
                made[name] = ScalarHead(hidden_size, device=device, dtype=getattr(torch, case.dtype))
    return made[name]


def base_parameters(model: LoadedModel, adapters: Adapters) -> list[nn.Parameter]:
    """The weights of a trunk, adapters excluded."""
    excluded = {id(p) for p in adapters.parameters()}
    return [p for p in model.trunk.parameters() if id(p) not in excluded]


def declare_trained(
    method: Method,
    models: Mapping[str, LoadedModel],
    adapters: Mapping[str, Adapters],
    scalar_heads: Mapping[str, ScalarHead],
) -> dict[str, list[nn.Parameter]]:
    """Makes the trained weights require gradients.

    Returns:
        Those of each role. A weight that two roles train belongs to the first.
    """
    trained = {name: method.roles[name] for name in method.trained_roles}
    for base, sets in adapters.items():
        sets.train([r.adapter for r in trained.values() if r.base == base and r.adapter and "adapter" in r.trains])
    owned: dict[int, str] = {}
    found: dict[str, list[nn.Parameter]] = {}
    for name, role in trained.items():
        candidates: list[nn.Parameter] = []
        if "base" in role.trains:
            candidates += base_parameters(models[role.base], adapters[role.base])
        if "adapter" in role.trains and role.adapter is not None:
            candidates += adapters[role.base].parameters(role.adapter)
        if "head" in role.trains:
            head = scalar_heads[name] if name in scalar_heads else models[role.base].lm_head
            assert head is not None
            candidates += head.parameters()
        found[name] = [p for p in dict.fromkeys(candidates) if owned.setdefault(id(p), name) == name]
    for parameters in found.values():
        for parameter in parameters:
            parameter.requires_grad_(True)
    return found
