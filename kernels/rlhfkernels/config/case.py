"""A case: one method on one model at one size on one device, with every option that changes what is done."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from typing import Any, Self

from rlhfkernels.errors import CaseError
from rlhfkernels.methods.table import METHODS, Method, Origin
from rlhfkernels.naming import unknown

DTYPES = ("float32", "bfloat16", "float64")
# Optimizers that are another package's.
OPTIMIZER_PACKAGES = {"adamw8bit": "bitsandbytes"}
# Forms of the ops that are written for another package.
KERNEL_PACKAGES = {"triton": "triton"}
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What defines a case beside its size; every field has a default and stands in every record.

    Attributes:
        lora_scaling: multiplier of the low-rank product. PEFT's ``lora_alpha / r``; Hydra-RLHF's code line used 1/r.
        lora_targets: ``all-linear`` (every linear layer of the trunk) or module names joined by commas.
        adapter_dtype: dtype of the adapters' weights; ``None`` is the dtype of the case.
        reward_model: what every base that starts from the reward model is: a preset, a checkpoint folder, a .gguf file
            or a hub id with the policy's vocabulary; ``None`` is the policy's model.
        critic_head: ``trained``, or ``frozen``: the critic then reads the reward head, as the paper's code line did.
        engine: how a trunk is run: ``plain`` is transformers and PEFT themselves; ``fast`` decodes by a lean loop over
            the layers where it covers the architecture, else it is ``plain``.
        kernels: how ops are computed that have several forms, most of them under the ``fast`` engine: ``torch``;
            ``triton`` (on a CUDA device, where that package is installed); ``native`` (on a processor in float32: C,
            compiled here when first needed); or ``auto``, which is ``triton`` or ``native`` wherever that can run.
        attention: ``sdpa`` or ``eager`` (attention matrices are made and kept, as at the paper's time).
        kv_cache: ``preallocated`` at its full length, or ``growing`` by concatenation.
        gradient_checkpointing: keep each layer's input only, and recompute the layer in the backward.
        logprob_chunk: completion positions whose logits exist at one time; 0 keeps the logits of all of them.
        micro_batch_size: sequences per differentiated forward; ``None`` is the whole mini-batch.
        num_mini_batches: optimizer steps per epoch over one rollout.
        ppo_epochs: passes over one rollout.
        optimizer: ``adamw`` (fused), ``adamw8bit`` (bitsandbytes' 8-bit states; to run it, that package is needed; to
            plan it, not) or ``sgd``.
        actor_lr, critic_lr: peak learning rates. Weights that both roles train take the actor's.
        warmup_steps, total_steps: linear warm-up, then cosine decay to 0 at ``total_steps``.
        weight_decay, adam_eps, max_grad_norm: as in AdamW; the norm is clipped per role, before the optimizer.
        kl_coef: β of the per-token penalty −β·(log π − log π_ref).
        gamma, lam: discount and GAE's λ.
        clip_range, value_clip_range: ε of the clipped surrogate and of the clipped value loss.
        value_coef: multiplier of the value loss (Hydra-RLHF Tables 12 and 13, "Critic Loss Multiplier").
        entropy_coef: weight of the entropy bonus; 0 computes none.
        reward_clip: the reward model's score is clamped into (−c, c); ``None`` leaves it.
        bootstrap_truncated: a completion cut by length is followed by V of its last token instead of 0.
        temperature: divides the logits wherever a log-probability is taken.
        stop_token: token id that ends a completion; ``None``: every completion has exactly its length.
        prompts: path of a JSONL file of prompts; ``None`` draws random token ids.
        prompt_field: the field of a row that holds the prompt.
    """

    lora_scaling: float = 1.0
    lora_targets: str = "all-linear"
    adapter_dtype: str | None = None
    reward_model: str | None = None
    critic_head: str = "trained"
    engine: str = "fast"
    kernels: str = "auto"
    attention: str = "sdpa"
    kv_cache: str = "preallocated"
    gradient_checkpointing: bool = False
    logprob_chunk: int = 128
    micro_batch_size: int | None = None
    num_mini_batches: int = 1
    ppo_epochs: int = 1
    optimizer: str = "adamw"
    actor_lr: float = 1e-4
    critic_lr: float = 1e-4
    warmup_steps: int = 0
    total_steps: int = 1000
    weight_decay: float = 0.0
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0
    kl_coef: float = 0.02
    gamma: float = 1.0
    lam: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_coef: float = 1.0
    entropy_coef: float = 0.0
    reward_clip: float | None = 1.0
    bootstrap_truncated: bool = False
    temperature: float = 1.0
    stop_token: int | None = None
    prompts: str | None = None
    prompt_field: str = "prompt"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is run and measured. See ``Options`` for the rest of its definition.

    Raises:
        CaseError: some field breaks a rule; every problem is named.
    """

    method: str
    model: str
    prompt_len: int
    completion_len: int
    batch_size: int
    device: str = "cpu"
    dtype: str = "float32"
    lora_rank: int = 16
    seed: int = 0
    options: Options = dataclasses.field(default_factory=Options)

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise CaseError(problems)

    @property
    def id(self) -> str:
        """Twelve hex digits of a hash over everything that defines the case."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def role_table(self) -> Method:
        """The method's role table with this case's options applied."""
        method = METHODS[self.method]
        return method.with_frozen_critic_head() if self.options.critic_head == "frozen" else method

    def model_of(self, origin: Origin) -> str:
        """The model that bases of ``origin`` start from."""
        return {"policy": self.model, "reward": self.options.reward_model or self.model}[origin]

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that the method's bases start from, the policy's first."""
        origins = self.role_table.origins.values()
        return tuple(dict.fromkeys(self.model_of(origin) for origin in ("policy", "reward") if origin in origins))

    @property
    def seq_len(self) -> int:
        """Prompt and completion together."""
        return self.prompt_len + self.completion_len

    @property
    def micro_batch_size(self) -> int:
        """Sequences per differentiated forward."""
        return self.options.micro_batch_size or self.mini_batch_size

    @property
    def mini_batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.batch_size // self.options.num_mini_batches

    def to_dict(self) -> dict[str, Any]:
        """The ``case`` object of a record."""
        return {"id": self.id, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``; the id is derived, not read."""
        fields = {key: value for key, value in data.items() if key not in ("id", "options")}
        return cls(**fields, options=Options(**data.get("options", {})))


# The rules, by field. A bool is no whole number here.
_INTEGER_RULES = {
    "prompt_len": 1,
    "completion_len": 1,
    "batch_size": 1,
    "lora_rank": 1,
    "options.num_mini_batches": 1,
    "options.ppo_epochs": 1,
    "options.total_steps": 1,
    "seed": 0,
    "options.logprob_chunk": 0,
    "options.warmup_steps": 0,
}
_OPTIONAL_INTEGER_RULES = {"options.micro_batch_size": 1, "options.stop_token": 0}
_POSITIVE = ("options.adam_eps", "options.max_grad_norm", "options.temperature")
_NON_NEGATIVE = (
    "options.actor_lr",
    "options.critic_lr",
    "options.weight_decay",
    "options.kl_coef",
    "options.clip_range",
    "options.value_clip_range",
    "options.value_coef",
    "options.entropy_coef",
)
_UNIT_INTERVAL = ("options.gamma", "options.lam")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "dtype": DTYPES,
    "options.adapter_dtype": (None, *DTYPES),
    "options.critic_head": ("trained", "frozen"),
    "options.engine": ("plain", "fast"),
    "options.kernels": ("auto", "torch", "triton", "native"),
    "options.attention": ("sdpa", "eager"),
    "options.kv_cache": ("preallocated", "growing"),
    "options.optimizer": ("adamw", "adamw8bit", "sgd"),
    "options.gradient_checkpointing": (True, False),
    "options.bootstrap_truncated": (True, False),
}


def _value(case: Case, field: str) -> Any:
    target: Any = case
    for name in field.split("."):
        target = getattr(target, name)
    return target


def _problems(case: Case) -> list[str]:
    """Every rule that ``case`` breaks, one sentence each."""
    found: list[str] = []
    if case.method not in METHODS:
        found.append(unknown("method", case.method, METHODS))
    if not isinstance(case.device, str) or not _DEVICE.fullmatch(case.device):
        found.append(unknown("device", case.device, ("cpu", "cuda", "cuda:0")))
    for field, choices in _CHOICES.items():
        value = _value(case, field)
        if value not in choices:
            found.append(unknown(field, value, [str(choice) for choice in choices]))
    for field, least in _INTEGER_RULES.items():
        found += _check_integer(field, _value(case, field), least)
    for field, least in _OPTIONAL_INTEGER_RULES.items():
        if _value(case, field) is not None:
            found += _check_integer(field, _value(case, field), least)
    found += _check_numbers(case)
    return found or [*_check_batches(case), *_check_optimizer(case), *_check_kernels(case), *_check_reward_model(case)]


def _check_integer(field: str, value: object, least: int) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        return [f"{field} is {value!r}: it must be a whole number of at least {least}."]
    return []


def _check_numbers(case: Case) -> list[str]:
    found: list[str] = []
    for fields, rule, holds in (
        (_POSITIVE, "a number above 0", lambda x: x > 0),
        (_NON_NEGATIVE, "a number of at least 0", lambda x: x >= 0),
        (_UNIT_INTERVAL, "a number from 0 to 1", lambda x: 0 <= x <= 1),
        (("options.lora_scaling",), "a finite number", lambda x: True),
    ):
        for field in fields:
            value = _value(case, field)
            if not _is_number(value) or not holds(value):
                found.append(f"{field} is {value!r}: it must be {rule}.")
    clip = case.options.reward_clip
    if clip is not None and (not _is_number(clip) or clip <= 0):
        found.append(f"options.reward_clip is {clip!r}: it must be a number above 0, or absent.")
    return found


def _check_batches(case: Case) -> list[str]:
    found: list[str] = []
    options = case.options
    if case.batch_size % options.num_mini_batches:
        found.append(
            f"options.num_mini_batches is {options.num_mini_batches}: it must divide batch_size {case.batch_size}."
        )
    elif options.micro_batch_size and case.mini_batch_size % options.micro_batch_size:
        found.append(
            f"options.micro_batch_size is {options.micro_batch_size}: it must divide the mini-batch of "
            f"{case.mini_batch_size} (batch_size / num_mini_batches)."
        )
    return found


def _check_optimizer(case: Case) -> list[str]:
    optimizer = case.options.optimizer
    if optimizer in OPTIMIZER_PACKAGES and case.dtype == "float64":
        package = OPTIMIZER_PACKAGES[optimizer]
        return [f"options.optimizer is {optimizer!r}: {package} has no float64, so dtype must be float32 or bfloat16."]
    return []


def _check_kernels(case: Case) -> list[str]:
    kernels = case.options.kernels
    found = []
    if kernels == "triton" and case.device == "cpu":
        found.append(f"options.kernels is {kernels!r}: it needs a CUDA device, so device must not be 'cpu'.")
    if kernels == "triton" and case.dtype == "float64":
        found.append(f"options.kernels is {kernels!r}: it has no float64, so dtype must be float32 or bfloat16.")
    if kernels == "native" and case.device != "cpu":
        found.append(f"options.kernels is {kernels!r}: it is a processor's, so device must be 'cpu'.")
    if kernels == "native" and case.dtype != "float32":
        found.append(f"options.kernels is {kernels!r}: it has no {case.dtype}, so dtype must be float32.")
    return found


def _check_reward_model(case: Case) -> list[str]:
    model = case.options.reward_model
    if model is None:
        return []
    if not isinstance(model, str) or not model:
        return [f"options.reward_model is {model!r}: it must be a name, or absent."]
    if "reward" not in METHODS[case.method].origins.values():
        return [
            f"options.reward_model is {model!r}: method {case.method!r} has no base of its own for the reward (it "
            "shares the policy's), so it must be absent."
        ]
    return []


def vocabulary_problem(sizes: dict[str, int]) -> str:
    """The sentence for models of one case whose vocabularies differ: ``sizes`` by model, the policy's first."""
    (policy, own), (reward, other) = list(sizes.items())[:2]
    return (
        f"options.reward_model is {reward!r} with a vocabulary of {other}: it must have as many tokens as model "
        f"{policy!r}, which has {own}."
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
