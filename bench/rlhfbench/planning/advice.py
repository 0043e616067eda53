"""Advice for a case that does not fit at batch size 1: options that shrink its largest memory part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from rlhfbench.planning.devices import Accelerator
from rlhfbench.planning.prediction import Plan
from rlhfbench.planning.zero import Zero
from rlhfkernels.config.case import Case
from rlhfkernels.methods.table import METHODS

_NARROW = ("bfloat16",)  # the narrowest dtypes of a case
_SMALL_CHUNK = 16  # at this chunk size, logits are a negligible part


@dataclasses.dataclass(frozen=True, slots=True)
class Remedy:
    """A change that makes a memory part smaller.

    Attributes:
        text: The option to set, or a function from the case to it.
        helps: Returns ``False`` if the case has the change already or cannot have it.
    """

    text: str | Callable[[Case], str]
    helps: Callable[[Case, Zero], bool] = lambda case, zero: True

    def text_for(self, case: Case) -> str:
        """Returns the text for ``case``."""
        return self.text if isinstance(self.text, str) else self.text(case)


def _fewer_bases(case: Case) -> list[str]:
    own = METHODS[case.method]
    return [
        name
        for name, method in METHODS.items()
        if method.family == own.family and method.num_static_models < own.num_static_models
    ]


def _adapter_methods(case: Case) -> list[str]:
    """Returns the methods of the same family that train no base; none if the method of ``case`` is one of them."""
    own = METHODS[case.method]
    if not own.trains_a_base:
        return []
    return [name for name, method in METHODS.items() if method.family == own.family and not method.trains_a_base]


def _divided_from(stage: int) -> tuple[Remedy, Remedy]:
    """Returns the remedies of ZeRO for a part that is divided from ``stage`` on: that stage, then more ranks."""
    return (
        Remedy(f"--zero-stage {stage} over several ranks", lambda case, zero: zero.stage < stage),
        Remedy("a larger --world-size", lambda case, zero: zero.stage >= stage),
    )


_NARROWER = Remedy("--dtype bfloat16", lambda case, zero: case.dtype not in _NARROW)
_FEWER_BASES = Remedy(
    lambda case: f"a method with fewer bases ({', '.join(_fewer_bases(case))})",
    lambda case, zero: bool(_fewer_bases(case)),
)
_ADAPTERS = Remedy(
    lambda case: f"a method that trains adapters ({', '.join(_adapter_methods(case))})",
    lambda case, zero: bool(_adapter_methods(case)),
)
_RANK = Remedy(
    "a smaller --lora-rank", lambda case, zero: case.options.lora.r > 1 and bool(case.role_table.adapter_sets)
)
_SMALLER_MODEL = Remedy("a smaller model")
_SHORTER = Remedy("a shorter length")
_SDPA = Remedy(
    "--option engine.attn_implementation=sdpa", lambda case, zero: case.options.engine.attn_implementation == "eager"
)

# Remedies by memory part, the most effective first.
REMEDIES: dict[str, tuple[Remedy, ...]] = {
    "base": (_FEWER_BASES, _NARROWER, *_divided_from(3), _SMALLER_MODEL),
    "adapters": (
        _RANK,
        Remedy(
            "fewer --option lora.target_modules", lambda case, zero: case.options.lora.target_modules == "all-linear"
        ),
        Remedy(
            "--option lora.dtype=bfloat16",
            lambda case, zero: (case.options.lora.dtype or case.dtype) not in _NARROW,
        ),
        *_divided_from(3),
    ),
    "heads": (_FEWER_BASES, _NARROWER, *_divided_from(3), _SMALLER_MODEL),
    "gradients": (_ADAPTERS, _RANK, _NARROWER, *_divided_from(2)),
    "optimizer": (
        _ADAPTERS,
        Remedy(
            "--option optimizer.name=adamw8bit",
            # DeepSpeed divides the states of torch's optimizers alone.
            lambda case, zero: case.options.optimizer.name == "adamw" and case.dtype != "float64" and zero.stage == 0,
        ),
        _RANK,
        *_divided_from(1),
    ),
    "kv_cache": (_NARROWER, _SHORTER),
    "gathered": (_NARROWER, _SMALLER_MODEL),
    "buckets": (Remedy("a smaller --option parallel.reduce_bucket_size"),),
    "activations": (
        Remedy(
            "--option engine.gradient_checkpointing=true",
            lambda case, zero: not case.options.engine.gradient_checkpointing,
        ),
        Remedy(
            "--option dpo.forward=two-pass",
            lambda case, zero: METHODS[case.method].source == "pairs" and case.options.dpo.forward == "joint",
        ),
        _SDPA,
        _NARROWER,
        _SHORTER,
    ),
    "rollout": (_SHORTER,),
    "temporary": (
        _SDPA,
        Remedy(
            f"--option engine.logprob_chunk_size={_SMALL_CHUNK}",
            lambda case, zero: not 0 < (case.options.engine.logprob_chunk_size or 0) <= _SMALL_CHUNK,
        ),
        _SHORTER,
    ),
    "device_reserve": (Remedy("a larger device"),),
}


def advice(plan: Plan, gpu: Accelerator) -> str:
    """Returns one sentence for a case that does not fit on ``gpu``: its largest part, and the remedies for it.

    Args:
        plan: Plan of the case at batch size 1.
        gpu: Device to fit on.
    """
    sizes = {**plan.memory["parts"], "device_reserve": gpu.reserve_bytes}
    part = max(sizes, key=lambda name: sizes[name])
    role_table = plan.case.role_table
    texts = [remedy.text_for(plan.case) for remedy in REMEDIES[part] if remedy.helps(plan.case, plan.zero)]
    return (
        f"{role_table.title} at {plan.case.seq_len} tokens does not fit on {gpu.name} even at batch 1: its largest "
        f"part is {part.replace('_', ' ')} with {sizes[part] / 2**30:.3g} GiB, and what would help is {_either(texts)}."
    )


def _either(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
