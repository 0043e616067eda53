"""Advice for a case that does not fit at batch size 1: options that shrink its largest memory part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from rlhfbench.planning.devices import Accelerator
from rlhfbench.planning.prediction import Plan
from rlhfbench.planning.zero import Zero
from rlhfkernels.config.case import Case
from rlhfkernels.errors import CaseError
from rlhfkernels.methods.table import METHODS

_NARROW = ("bfloat16",)  # the narrowest dtypes of a case
_SMALL_CHUNK = 16  # at this chunk size, logits are a negligible part


@dataclasses.dataclass(frozen=True, slots=True)
class Remedy:
    """A change that makes a memory part smaller.

    Attributes:
        text: The option to set, or a function from the case and its division to it.
        helps: Returns ``False`` if the case has the change already or cannot have it.
        changes: Fields and dotted options that it sets; it is no remedy for a case whose rules refuse them.
    """

    text: str | Callable[[Case, Zero], str]
    helps: Callable[[Case, Zero], bool] = lambda case, zero: True
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def texts_for(self, case: Case, zero: Zero) -> list[str]:
        """Returns the text for ``case`` divided by ``zero``; nothing if it is no remedy."""
        if not self.helps(case, zero) or (self.changes and not _is_valid(case, zero, self.changes)):
            return []
        return [self.text if isinstance(self.text, str) else self.text(case, zero)]


def _is_valid(case: Case, zero: Zero, changes: Mapping[str, Any]) -> bool:
    """True if the rules of a case allow ``changes``."""
    options = {name: value for name, value in changes.items() if "." in name}
    fields = {name: value for name, value in changes.items() if "." not in name}
    try:
        zero.of_a_rank(dataclasses.replace(case, options=case.options.replace(options), **fields))
    except CaseError:
        return False
    return True


def _fewer_bases(case: Case, zero: Zero) -> list[str]:
    own = METHODS[case.method]
    return [
        name
        for name, method in METHODS.items()
        if method.family == own.family
        and method.num_static_models < own.num_static_models
        and _is_valid(case, zero, {"method": name})
    ]


def _adapter_methods(case: Case, zero: Zero) -> list[str]:
    """Returns the methods of the same family that train no base; none if the method of ``case`` is one of them."""
    own = METHODS[case.method]
    if not own.trains_a_base:
        return []
    return [
        name
        for name, method in METHODS.items()
        if method.family == own.family and not method.trains_a_base and _is_valid(case, zero, {"method": name})
    ]


def _option(name: str, value: object, helps: Callable[[Case, Zero], bool]) -> Remedy:
    """Returns the remedy of one option."""
    return Remedy(f"--option {name}={str(value).lower()}", helps, {name: value})


def _divided_from(stage: int) -> tuple[Remedy, Remedy]:
    """Returns the remedies of ZeRO for a part that is divided from ``stage`` on: that stage, then more ranks."""

    def text(case: Case, zero: Zero) -> str:
        # Without another strategy, a stage alone is DeepSpeed's.
        strategy = "" if case.options.parallel.strategy in (None, "deepspeed") else "--parallel deepspeed "
        return f"{strategy}--zero-stage {stage} over several ranks"

    changes = {"parallel.strategy": "deepspeed", "parallel.zero_stage": stage, "parallel.world_size": 2}
    return (
        Remedy(text, lambda case, zero: not zero.divides_from(stage), changes),
        Remedy("a larger --world-size", lambda case, zero: zero.divides_from(stage)),
    )


_NARROWER = Remedy("--dtype bfloat16", lambda case, zero: case.dtype not in _NARROW, {"dtype": "bfloat16"})
_FEWER_BASES = Remedy(
    lambda case, zero: f"a method with fewer bases ({', '.join(_fewer_bases(case, zero))})",
    lambda case, zero: bool(_fewer_bases(case, zero)),
)
_ADAPTERS = Remedy(
    lambda case, zero: f"a method that trains adapters ({', '.join(_adapter_methods(case, zero))})",
    lambda case, zero: bool(_adapter_methods(case, zero)),
)
_RANK = Remedy(
    "a smaller --lora-rank", lambda case, zero: case.options.lora.r > 1 and bool(case.role_table.adapter_sets)
)
_SMALLER_MODEL = Remedy("a smaller model")
_SHORTER = Remedy("a shorter length")
_FEWER_SAMPLES = Remedy(
    "a smaller best_of_n.num_generations",
    lambda case, zero: case.role_table.generate is not None and case.sequences_per_row > 1,
)
_BY_LAYER = _option("parallel.gather", "layer", lambda case, zero: case.options.parallel.gather == "rollout")
# Not sdpa by name, which an architecture may not have.
_SDPA = _option(
    "engine.attn_implementation", "auto", lambda case, zero: case.options.engine.attn_implementation == "eager"
)

# Remedies by memory part, the most effective first. The last of each part applies to every case.
REMEDIES: dict[str, tuple[Remedy, ...]] = {
    "base": (_FEWER_BASES, _NARROWER, *_divided_from(3), _SMALLER_MODEL),
    "adapters": (
        _RANK,
        Remedy(
            "fewer modules in lora.target_modules",
            lambda case, zero: case.options.lora.target_modules == "all-linear",
        ),
        _option("lora.dtype", "bfloat16", lambda case, zero: (case.options.lora.dtype or case.dtype) not in _NARROW),
        *_divided_from(3),
        _SMALLER_MODEL,
    ),
    "heads": (_FEWER_BASES, _NARROWER, *_divided_from(3), _SMALLER_MODEL),
    "gradients": (_ADAPTERS, _RANK, _NARROWER, *_divided_from(2), _SMALLER_MODEL),
    "optimizer": (
        _ADAPTERS,
        _option(
            "optimizer.name",
            "adamw8bit",
            lambda case, zero: case.options.optimizer.name == "adamw" and case.dtype != "float64",
        ),
        _RANK,
        *_divided_from(1),
        _SMALLER_MODEL,
    ),
    "kv_cache": (_FEWER_SAMPLES, _NARROWER, _SHORTER),
    "gathered": (_BY_LAYER, _NARROWER, _SMALLER_MODEL),
    # From stage 1 on the bucket is allocated whole, however little is trained. The rest are copies of gradients.
    "buckets": (
        Remedy("a smaller parallel.reduce_bucket_size", lambda case, zero: zero.divides_from(1)),
        _NARROWER,
        _ADAPTERS,
        _divided_from(1)[1],
        _SMALLER_MODEL,
    ),
    "activations": (
        _option(
            "engine.gradient_checkpointing", True, lambda case, zero: not case.options.engine.gradient_checkpointing
        ),
        _option(
            "dpo.forward",
            "two-pass",
            lambda case, zero: METHODS[case.method].source == "pairs" and case.options.dpo.forward == "joint",
        ),
        _SDPA,
        _NARROWER,
        _SHORTER,
    ),
    "rollout": (_FEWER_SAMPLES, _SHORTER),
    "temporary": (
        _FEWER_SAMPLES,
        _SDPA,
        _option(
            "engine.logprob_chunk_size",
            _SMALL_CHUNK,
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
    texts = [text for remedy in REMEDIES[part] for text in remedy.texts_for(plan.case, plan.zero)]
    return (
        f"{role_table.title} at {plan.case.seq_len} tokens does not fit on {gpu.name} even at batch 1: its largest "
        f"part is {part.replace('_', ' ')} with {sizes[part] / 2**30:.3g} GiB, and what would help is {_either(texts)}."
    )


def _either(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
