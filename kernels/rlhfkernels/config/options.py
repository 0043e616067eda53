"""The options of a case, in groups. Names follow TRL, PEFT and transformers where these have one. Imports no torch.

Every field has a default and stands in every record. The annotations are the rules: ``rlhfkernels.config.rules`` checks
them and words them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Gt, Le, MinLen

from rlhfkernels.errors import CaseError
from rlhfkernels.naming import unknown

Dtype = Literal["float32", "bfloat16", "float64"]
MAX_COUNT = 2**31 - 1  # sizes of a step: tensors of their products must have sizes of 64 bits
Count = Annotated[int, Ge(1), Le(MAX_COUNT)]
Text = Annotated[str, MinLen(1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]

# ``engine.logprob_chunk_size`` on a CPU. Records that were made before the default followed the device hold it.
CPU_LOGPROB_CHUNK = 128

# Options that another package carries out, by option and value.
OPTION_PACKAGES: dict[str, dict[str, str]] = {
    "optimizer.name": {"adamw8bit": "bitsandbytes"},
    "engine.backend": {"triton": "triton"},
    "parallel.strategy": {"deepspeed": "deepspeed"},
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoraOptions:
    """Low-rank adapters (arXiv:2106.09685).

    Attributes:
        r: rank.
        alpha: the low-rank product is multiplied by ``alpha / r``, as in PEFT. ``None`` is ``r``, a factor of 1.
            Hydra-RLHF's code used an alpha of 1.
        target_modules: ``all-linear`` (every linear layer of the trunk) or module names joined by commas.
        dtype: dtype of the adapter weights; ``None`` is the dtype of the case.
    """

    r: Count = 16
    alpha: Positive | None = None
    target_modules: Text = "all-linear"
    dtype: Dtype | None = None

    @property
    def scaling(self) -> float:
        """The multiplier of the low-rank product."""
        return 1.0 if self.alpha is None else self.alpha / self.r


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """Computation of forward passes.

    Attributes:
        trunk: ``plain`` runs transformers' and PEFT's modules. ``fast`` runs this project's loop over the layers where
            it covers the architecture, else ``plain``.
        backend: the backend of ops that have several: ``torch``; ``triton`` (CUDA); ``native`` (C, on a CPU in
            float32); ``auto`` takes ``triton`` or ``native`` where it can run, else ``torch``.
        attn_implementation: ``sdpa``; ``eager``, which materializes the attention matrices; ``auto`` takes ``sdpa``
            where the architecture has it, else ``eager``.
        cache_implementation: KV cache: ``static`` is allocated once at full length, ``dynamic`` grows by concatenation.
        cuda_graphs: capture decode steps of the fast trunk as CUDA graphs. ``auto`` does so on CUDA, and runs the ops
            one by one where a capture fails; ``on`` needs CUDA and a capture that works; ``off`` never captures.
        gradient_checkpointing: keep each layer's input only, and recompute the layer in the backward pass.
        logprob_chunk_size: completion positions whose logits exist at one time; 0 keeps the logits of all of them.
            ``None`` is 128 on a CPU; elsewhere as many as 256 MiB of float32 logits hold, from 128 to 1024.
        micro_batch_size: data rows per forward pass of the phases ``prepare``, ``score`` and update; ``None`` is the
            whole mini-batch.
    """

    trunk: Literal["fast", "plain"] = "fast"
    backend: Literal["auto", "torch", "triton", "native"] = "auto"
    attn_implementation: Literal["auto", "sdpa", "eager"] = "auto"
    cache_implementation: Literal["static", "dynamic"] = "static"
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    gradient_checkpointing: bool = False
    logprob_chunk_size: Annotated[int, Ge(0)] | None = None
    micro_batch_size: Count | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerOptions:
    """The optimizers.

    Attributes:
        name: ``adamw`` (fused), ``adamw8bit`` (bitsandbytes' 8-bit states; planning needs no bitsandbytes) or ``sgd``.
        learning_rate: peak learning rate.
        warmup_steps: optimizer steps of linear warm-up, fewer than ``max_steps``.
        max_steps: the optimizer step at which the cosine decay reaches 0. A step of PPO has one for each mini-batch of
            each epoch.
        weight_decay: decoupled from the gradient by AdamW, added to it by ``sgd``.
        adam_epsilon: ε of AdamW; it matters under bfloat16.
        max_grad_norm: the gradient norm of each parameter group is clipped to this.
        grad_accum_dtype: dtype in which gradients are added up over micro-batches and over chunks of positions, at
            least that of the weight. The name is DeepSpeed's. ``None`` is float32 where there are several to add, else
            the dtype of the weight; with a ``parallel.strategy`` micro-batches add up in that of the weight.
    """

    name: Literal["adamw", "adamw8bit", "sgd"] = "adamw"
    learning_rate: NonNegative = 1e-4
    warmup_steps: Annotated[int, Ge(0)] = 0
    max_steps: Count = 1000
    weight_decay: NonNegative = 0.0
    adam_epsilon: Positive = 1e-8
    max_grad_norm: Positive = 1.0
    grad_accum_dtype: Dtype | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RolloutOptions:
    """Generation and scoring.

    Attributes:
        temperature: divides the logits wherever a log-probability is taken, in methods that sample. SFT and DPO sample
            nothing and ignore it.
        stop_token_id: token that ends a completion; ``None``: every completion has exactly its length.
        reward_model: the model of bases that start from the reward model: a preset, a checkpoint folder, a .gguf file
            or a Hugging Face model id with the policy's vocabulary; ``None`` is the policy's model.
    """

    temperature: Annotated[float, Ge(1e-6)] = 1.0  # one near 0 takes logits to infinity
    stop_token_id: Annotated[int, Ge(0)] | None = None
    reward_model: Text | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """Training data. Without a file, a step reads random tokens of exactly the case's lengths.

    Attributes:
        prompts: JSONL file of prompts.
        prompt_field: the field of a row that holds the prompt.
        demonstrations: JSONL file of prompts and completions, in TRL's prompt/completion format.
        pairs: JSONL file of preferences, in TRL's prompt/chosen/rejected format.
    """

    prompts: Text | None = None
    prompt_field: Text = "prompt"
    demonstrations: Text | None = None
    pairs: Text | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PPOOptions:
    """Proximal policy optimization (arXiv:1707.06347). Names are those of TRL's ``PPOConfig``.

    Attributes:
        kl_coef: β of the per-token penalty −β·(log π − log π_ref).
        gamma: discount γ.
        lam: λ of generalised advantage estimation.
        cliprange: ε of the clipped surrogate.
        cliprange_value: ε of the clipped value loss.
        vf_coef: multiplier of the value loss (Hydra-RLHF Tables 12 and 13, "Critic Loss Multiplier").
        entropy_coef: weight of the entropy bonus; 0 computes no entropy.
        reward_clip: the reward model's score is clamped to [−c, c]; ``None`` does not clamp it. Scores of a
            ``reward_fn`` are never clamped.
        bootstrap_truncated: a completion cut by length is followed by V of its last token instead of 0.
        critic_head: ``trained``, or ``frozen``: the critic reads the reward head, as in Hydra-RLHF's code.
        critic_learning_rate: peak learning rate of the critic; ``None`` is ``optimizer.learning_rate``. Weights that
            actor and critic share take the actor's.
        num_ppo_epochs: epochs over one rollout.
        num_mini_batches: optimizer steps per epoch.
    """

    kl_coef: NonNegative = 0.02
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    cliprange: NonNegative = 0.2
    cliprange_value: NonNegative = 0.2
    vf_coef: NonNegative = 1.0
    entropy_coef: NonNegative = 0.0
    reward_clip: Positive | None = 1.0
    bootstrap_truncated: bool = False
    critic_head: Literal["trained", "frozen"] = "trained"
    critic_learning_rate: NonNegative | None = None
    num_ppo_epochs: Count = 1
    num_mini_batches: Count = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SFTOptions:
    """Supervised fine-tuning. Names are those of TRL's ``SFTConfig``.

    Attributes:
        completion_only_loss: the loss covers the completions only, not the prompts.
        packing: the demonstrations of a micro-batch are read as one row without padding, each attending to itself
            alone. Loss and gradients are those of padded rows.
    """

    completion_only_loss: bool = True
    packing: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DPOOptions:
    """Direct preference optimization. Names are those of TRL's ``DPOConfig``.

    Attributes:
        beta: β, the weight of the implicit KL penalty.
        precompute_ref_log_probs: the reference's log-probabilities are read once for the data set, in a phase
            ``prepare`` before the first step, and a reference model of its own is freed then. Without a file, the data
            set is one random batch, which every step reads.
        forward: ``joint`` keeps one graph of both sequences of a pair. ``two-pass`` reads both without a graph, then
            each with a graph of its own: one forward more, half the activations, equal gradients.
    """

    beta: Positive = 0.1
    precompute_ref_log_probs: bool = False
    forward: Literal["joint", "two-pass"] = "joint"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BestOfNOptions:
    """Best-of-n sampling. The name is that of TRL's ``GRPOConfig``.

    Attributes:
        num_generations: samples per prompt, of which the best is kept.
    """

    num_generations: Count = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ParallelOptions:
    """One step over several processes, each with ``batch_size`` data rows of its own.

    Attributes:
        strategy: ``ddp``, every rank holds all weights and gradients are averaged (torch's
            ``DistributedDataParallel``); ``fsdp``, weights, gradients and optimizer states are sharded over the ranks
            (torch's ``fully_shard``); ``deepspeed``, what ``zero_stage`` shards (DeepSpeed's ZeRO). ``None`` is one
            process.
        world_size: processes.
        zero_stage: what DeepSpeed shards: 0 nothing, 1 optimizer states, 2 also gradients, 3 also weights.
        gather: sharded weights are gathered for generation: by ``layer``, for every token; or all of them once per
            ``rollout``.
        reduce_bucket_size: elements of DeepSpeed's buffer of gradients, in stages 1 to 3.
    """

    strategy: Literal["ddp", "fsdp", "deepspeed"] | None = None
    world_size: Annotated[int, Ge(1), Le(65_536)] = 1
    zero_stage: Annotated[int, Ge(0), Le(3)] = 0
    gather: Literal["layer", "rollout"] = "layer"
    reduce_bucket_size: Count = 500_000_000

    @property
    def divides_weights(self) -> bool:
        """True where a rank holds a part of each weight, and gathers the rest to use it."""
        return self.strategy == "fsdp" or self.zero_stage == 3

    @property
    def moves_weights(self) -> bool:
        """True where DeepSpeed puts trained weights, which every rank holds whole, into storages of its own."""
        return self.zero_stage in (1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Every option of a case, by group.

    Attributes:
        lora: see ``LoraOptions``.
        engine: see ``EngineOptions``.
        optimizer: see ``OptimizerOptions``.
        rollout: see ``RolloutOptions``.
        data: see ``DataOptions``.
        ppo: see ``PPOOptions``.
        sft: see ``SFTOptions``.
        dpo: see ``DPOOptions``.
        best_of_n: see ``BestOfNOptions``.
        parallel: see ``ParallelOptions``.
    """

    lora: LoraOptions = LoraOptions()
    engine: EngineOptions = EngineOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    rollout: RolloutOptions = RolloutOptions()
    data: DataOptions = DataOptions()
    ppo: PPOOptions = PPOOptions()
    sft: SFTOptions = SFTOptions()
    dpo: DPOOptions = DPOOptions()
    best_of_n: BestOfNOptions = BestOfNOptions()
    parallel: ParallelOptions = ParallelOptions()

    @classmethod
    def of(cls, values: Mapping[str, Any] = {}, /) -> Self:
        """The options with ``values`` by dotted name, and defaults elsewhere.

        Values are checked when a ``Case`` is made of them.

        Raises:
            CaseError: there is no option of some name.

        Example:
            >>> Options.of({"ppo.kl_coef": 0.05, "lora.r": 8}).ppo.kl_coef
            0.05
        """
        return cls().replace(values)

    def replace(self, values: Mapping[str, Any], /) -> Self:
        """These options with other ``values`` by dotted name.

        Raises:
            CaseError: there is no option of some name.
        """
        wrong = [unknown_option(name) for name in values if name not in option_names()]
        if wrong:
            raise CaseError(wrong)
        groups: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            group, _, field = name.partition(".")
            groups.setdefault(group, {})[field] = value
        return dataclasses.replace(
            self, **{group: dataclasses.replace(getattr(self, group), **fields) for group, fields in groups.items()}
        )

    def get(self, name: str) -> Any:
        """The option with a dotted name."""
        group, _, field = name.partition(".")
        return getattr(getattr(self, group), field)

    def flat(self) -> dict[str, Any]:
        """Every option by dotted name."""
        return {
            f"{group.name}.{field}": value
            for group in dataclasses.fields(self)
            for field, value in dataclasses.asdict(getattr(self, group.name)).items()
        }


def option_fields() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """(dotted name, field) of every option; the field's type is text, for ``rlhfkernels.config.rules`` to resolve."""
    defaults = Options()
    for group in dataclasses.fields(Options):
        for field in dataclasses.fields(getattr(defaults, group.name)):
            yield f"{group.name}.{field.name}", field


@functools.cache
def option_names() -> dict[str, None]:
    """The dotted name of every option, in their order."""
    return dict.fromkeys(name for name, _ in option_fields())


def unknown_option(name: str) -> str:
    """One sentence saying that there is no option ``name``, with the new name of one that was renamed."""
    if name in RENAMED_OPTIONS:
        return f"option {name!r} is now called {RENAMED_OPTIONS[name]!r}."
    return unknown("option", name, option_names())


# Options of records of schema 1 and of flags before the groups, by the dotted name that each has now.
RENAMED_OPTIONS: dict[str, str] = {
    "lora_rank": "lora.r",
    "lora_scaling": "lora.alpha",
    "lora_targets": "lora.target_modules",
    "adapter_dtype": "lora.dtype",
    "reward_model": "rollout.reward_model",
    "critic_head": "ppo.critic_head",
    "engine": "engine.trunk",
    "kernels": "engine.backend",
    "attention": "engine.attn_implementation",
    "kv_cache": "engine.cache_implementation",
    "gradient_checkpointing": "engine.gradient_checkpointing",
    "logprob_chunk": "engine.logprob_chunk_size",
    "micro_batch_size": "engine.micro_batch_size",
    "num_mini_batches": "ppo.num_mini_batches",
    "ppo_epochs": "ppo.num_ppo_epochs",
    "optimizer": "optimizer.name",
    "actor_lr": "optimizer.learning_rate",
    "critic_lr": "ppo.critic_learning_rate",
    "warmup_steps": "optimizer.warmup_steps",
    "total_steps": "optimizer.max_steps",
    "weight_decay": "optimizer.weight_decay",
    "adam_eps": "optimizer.adam_epsilon",
    "max_grad_norm": "optimizer.max_grad_norm",
    "kl_coef": "ppo.kl_coef",
    "gamma": "ppo.gamma",
    "lam": "ppo.lam",
    "clip_range": "ppo.cliprange",
    "value_clip_range": "ppo.cliprange_value",
    "value_coef": "ppo.vf_coef",
    "entropy_coef": "ppo.entropy_coef",
    "reward_clip": "ppo.reward_clip",
    "bootstrap_truncated": "ppo.bootstrap_truncated",
    "temperature": "rollout.temperature",
    "stop_token": "rollout.stop_token_id",
    "prompts": "data.prompts",
    "prompt_field": "data.prompt_field",
}
