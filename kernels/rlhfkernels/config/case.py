"""A case: one method on one model at one size on one device, with every option that changes what is done."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self, get_args

from annotated_types import Ge, Lt

from rlhfkernels.config.content import content_hash
from rlhfkernels.config.options import CPU_LOGPROB_CHUNK, Count, Dtype, Options, Text, option_fields
from rlhfkernels.config.rules import checked, hints, shown
from rlhfkernels.errors import CaseError
from rlhfkernels.methods.method import Method
from rlhfkernels.methods.program import Origin, SourceName
from rlhfkernels.methods.table import METHODS
from rlhfkernels.naming import unknown

_DEVICE = re.compile(r"cpu|cuda(:(0|[1-9][0-9]{0,2}))?")  # as torch reads it


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One method on one model at one size on one device.

    Attributes:
        method: a name in ``METHODS``.
        model: a preset, a checkpoint folder, a .gguf file or a Hugging Face model id.
        prompt_len: tokens of a prompt.
        completion_len: tokens of a completion.
        batch_size: data rows a step: prompts, demonstrations or pairs; those of one rank where there are several.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: of the weights.
        seed: of weights, data and samples; torch's generator on a CPU keeps its lower 32 bits.
        options: everything else, by group.

    Raises:
        CaseError: some field breaks a rule; every problem is named.

    Example:
        >>> case = Case(method="dpo-lora", model="tiny", prompt_len=32, completion_len=32, batch_size=2)
        >>> case.seq_len, case.sequences_per_row
        (64, 2)
    """

    method: str
    model: Text
    prompt_len: Count
    completion_len: Count
    batch_size: Count
    device: str = "cpu"
    dtype: Dtype = "float32"
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    options: Options = dataclasses.field(default_factory=Options)

    def __post_init__(self) -> None:
        problems = [*self._check_fields(), *self._check_options()]
        problems = problems or list(_problems(self))
        if problems:
            raise CaseError(problems)

    def _check_fields(self) -> Iterator[str]:
        if not isinstance(self.method, str) or self.method not in METHODS:
            yield unknown("method", self.method, METHODS)
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            yield unknown("device", self.device, ("cpu", "cuda", "cuda:0"))
        annotations = hints(Case)
        for field in ("model", "prompt_len", "completion_len", "batch_size", "dtype", "seed"):
            _, problem = checked(field, getattr(self, field), annotations[field])
            if problem is not None:
                yield problem

    def _check_options(self) -> Iterator[str]:
        """Checks every option and converts integers that stand for floats."""
        if not isinstance(self.options, Options):
            yield f"options is {shown(self.options)}: it must be Options, as from Options.of({{'lora.r': 8}})."
            return
        kinds = hints(Options)
        wrong = [name for name, kind in kinds.items() if not isinstance(getattr(self.options, name), kind)]
        for name in wrong:
            yield f"{name} is {shown(getattr(self.options, name))}: it must be {kinds[name].__name__}."
        if wrong:
            return
        values = {}
        for name, annotation in option_annotations().items():
            group, field = name.split(".")
            values[name], problem = checked(name, getattr(getattr(self.options, group), field), annotation)
            if problem is not None:
                yield problem
        object.__setattr__(self, "options", self.options.replace(values))

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits of a hash over the fields that differ from their defaults.

        A new option therefore changes no id. A data file counts by its content and not by its path.
        """
        text = json.dumps(self._distinct(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _distinct(self) -> dict[str, Any]:
        """Every field without a default, and those that differ from it; options by dotted name."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "options" and getattr(self, field.name) != field.default
        }
        defaults = Options().flat()
        options = {name: value for name, value in self.options.flat().items() if value != defaults[name]}
        if self.device == "cpu" and options.get("engine.logprob_chunk_size") == CPU_LOGPROB_CHUNK:
            del options["engine.logprob_chunk_size"]  # the default of the device, stated
        file = self.data_file
        if file is not None:
            options[f"data.{METHODS[self.method].source}"] = content_hash(file) or file
        return fields | options

    @property
    def role_table(self) -> Method:
        """The method with this case's options applied."""
        return METHODS[self.method].with_options(self.options.flat())

    def model_of(self, origin: Origin) -> str:
        """The model that bases of ``origin`` start from."""
        return {"policy": self.model, "reward": self.options.rollout.reward_model or self.model}[origin]

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
    def rows_per_step(self) -> int:
        """Data rows of a step over all ranks."""
        return self.batch_size * self.options.parallel.world_size

    @property
    def micro_batch_size(self) -> int:
        """Data rows per forward pass of the phases ``prepare``, ``score`` and update."""
        return self.options.engine.micro_batch_size or self.mini_batch_size

    @property
    def mini_batch_size(self) -> int:
        """Data rows per optimizer step."""
        return self.batch_size // self._count(METHODS[self.method].mini_batches)

    @property
    def num_epochs(self) -> int:
        """Epochs over one batch."""
        return self._count(METHODS[self.method].epochs)

    @property
    def sequences_per_row(self) -> int:
        """Sequences of one data row: 2 for a preference pair, n where n completions are sampled."""
        return METHODS[self.method].sequences_per_row(self.options.flat())

    @property
    def data_file(self) -> str | None:
        """The file that the method's data comes from; ``None`` is random tokens."""
        file: str | None = getattr(self.options.data, METHODS[self.method].source)
        return file

    def _count(self, option: str | None) -> int:
        return 1 if option is None else int(self.options.get(option))  # inside timed phases, where flat() takes 42 us

    def to_dict(self) -> dict[str, Any]:
        """The ``case`` object of a record."""
        return {"id": self.id, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of ``to_dict``; the id is derived, not read."""
        fields = {key: value for key, value in data.items() if key not in ("id", "options")}
        values = {
            f"{group}.{field}": value
            for group, table in data.get("options", {}).items()
            for field, value in table.items()
        }
        return cls(**fields, options=Options.of(values))


@functools.cache
def option_annotations() -> dict[str, Any]:
    """The annotation of every option by dotted name."""
    groups = hints(Options)
    return {name: hints(groups[name.split(".")[0]])[field.name] for name, field in option_fields()}


def _problems(case: Case) -> Iterator[str]:
    """The rules that tie several fields together."""
    yield from _check_data(case)
    yield from _check_batches(case)
    yield from _check_optimizer(case)
    yield from _check_backend(case)
    yield from _check_graphs(case)
    yield from _check_reward_model(case)
    yield from _check_parallel(case)


def _check_data(case: Case) -> Iterator[str]:
    method = METHODS[case.method]
    for kind in get_args(SourceName):
        path = getattr(case.options.data, kind)
        if path is not None and kind != method.source:
            yield f"data.{kind} is {path!r}: method {case.method!r} takes {method.source}, so it must be none."


def _check_batches(case: Case) -> Iterator[str]:
    micro = case.options.engine.micro_batch_size
    mini = case._count(METHODS[case.method].mini_batches)
    if case.batch_size % mini:
        yield f"ppo.num_mini_batches is {mini}: it must divide batch_size {case.batch_size}."
    elif micro and case.mini_batch_size % micro:
        yield (
            f"engine.micro_batch_size is {micro}: it must divide the mini-batch of {case.mini_batch_size} "
            "(batch_size / num_mini_batches)."
        )


def _check_optimizer(case: Case) -> Iterator[str]:
    adapters = case.options.lora.dtype if METHODS[case.method].adapter_sets else None
    for field, dtype in (("dtype", case.dtype), ("lora.dtype", adapters)):
        if case.options.optimizer.name == "adamw8bit" and dtype == "float64":
            yield f"optimizer.name is 'adamw8bit': bitsandbytes has no float64, so {field} must be float32 or bfloat16."
    warmup_steps, max_steps = case.options.optimizer.warmup_steps, case.options.optimizer.max_steps
    if warmup_steps >= max_steps:
        yield f"optimizer.warmup_steps is {warmup_steps}: it must be below optimizer.max_steps, which is {max_steps}."


def _check_backend(case: Case) -> Iterator[str]:
    backend = case.options.engine.backend
    if backend == "triton" and case.device == "cpu":
        yield f"engine.backend is {backend!r}: it needs a CUDA device, so device must not be 'cpu'."
    if backend == "triton" and case.dtype == "float64":
        yield f"engine.backend is {backend!r}: it has no float64, so dtype must be float32 or bfloat16."
    if backend == "native" and case.device != "cpu":
        yield f"engine.backend is {backend!r}: it runs on a CPU, so device must be 'cpu'."
    if backend == "native" and case.dtype != "float32":
        yield f"engine.backend is {backend!r}: it has no {case.dtype}, so dtype must be float32."


def _check_graphs(case: Case) -> Iterator[str]:
    engine = case.options.engine
    if engine.cuda_graphs != "on":
        return
    if case.device == "cpu":
        yield "engine.cuda_graphs is 'on': it needs a CUDA device, so device must not be 'cpu'."
    of_fast_trunk = "engine.cuda_graphs is 'on': it captures steps of the fast trunk, so"
    if engine.trunk == "plain":
        yield f"{of_fast_trunk} engine.trunk must not be 'plain'."
    if engine.attn_implementation == "eager":
        yield f"{of_fast_trunk} engine.attn_implementation must not be 'eager'."
    if engine.cache_implementation == "dynamic":
        yield f"{of_fast_trunk} engine.cache_implementation must not be 'dynamic'."
    if case.options.parallel.divides_weights:
        yield "engine.cuda_graphs is 'on': divided weights are gathered in every step, so it must be auto or off."


def _check_reward_model(case: Case) -> Iterator[str]:
    model = case.options.rollout.reward_model
    if model is not None and "reward" not in METHODS[case.method].origins.values():
        yield (
            f"rollout.reward_model is {model!r}: method {case.method!r} has no base of its own for the reward, so it "
            "must be none."
        )


def _check_parallel(case: Case) -> Iterator[str]:
    parallel = case.options.parallel
    if parallel.strategy is None and parallel.world_size > 1:
        yield f"parallel.world_size is {parallel.world_size}: it needs parallel.strategy, one of ddp, fsdp, deepspeed."
    if parallel.strategy != "deepspeed" and parallel.zero_stage:
        yield (
            f"parallel.zero_stage is {parallel.zero_stage}: ZeRO is DeepSpeed's, so parallel.strategy must be "
            "'deepspeed'."
        )
    accumulated, trained = case.options.optimizer.grad_accum_dtype, _trained_dtypes(case)
    if parallel.strategy is not None and accumulated is not None and trained - {accumulated}:
        only = f" or {min(trained)!r}" if len(trained) == 1 else ""
        yield (
            f"optimizer.grad_accum_dtype is {accumulated!r}: with parallel.strategy {parallel.strategy!r} gradients "
            f"add up in the dtype of the weights, so it must be none{only}."
        )
    if parallel.strategy == "deepspeed":
        yield from _check_deepspeed(case)
    if parallel.gather == "rollout" and not parallel.divides_weights:
        yield (
            "parallel.gather is 'rollout': no weights are divided, so parallel.strategy must be 'fsdp' or "
            "parallel.zero_stage 3."
        )


def _trained_dtypes(case: Case) -> set[str]:
    """The dtypes of the weights that are trained: adapters may have their own."""
    parts = {part for role in case.role_table.roles.values() for part in role.trains}
    return {(case.options.lora.dtype or case.dtype) if part == "adapter" else case.dtype for part in parts}


def _check_deepspeed(case: Case) -> Iterator[str]:
    if case.dtype == "float64":
        yield "parallel.strategy is 'deepspeed': its master weights are float32, so dtype must be float32 or bfloat16."
    if case.role_table.adapter_sets and case.options.lora.dtype not in (None, case.dtype):
        yield (
            f"lora.dtype is {case.options.lora.dtype!r}: DeepSpeed lays trained weights in one storage, so it must be "
            f"none or {case.dtype!r}."
        )
    if case.options.optimizer.name == "adamw8bit":
        yield "optimizer.name is 'adamw8bit': DeepSpeed divides the states of torch's, so it must be adamw or sgd."


def vocabulary_problem(sizes: dict[str, int]) -> str:
    """The message for models whose vocabularies differ; ``sizes`` are tokens by model, the policy first."""
    (policy, own), (reward, other) = list(sizes.items())[:2]
    return (
        f"rollout.reward_model is {reward!r} with a vocabulary of {other}: it must have as many tokens as model "
        f"{policy!r}, which has {own}."
    )


def stop_token_problem(model: str, token: int | None, vocab_size: int) -> str | None:
    """The message for a stop token that ``model`` does not have; ``None`` where it has it."""
    if token is None or token < vocab_size:
        return None
    return f"rollout.stop_token_id is {token}: it must be below {vocab_size}, the vocabulary of model {model!r}."
