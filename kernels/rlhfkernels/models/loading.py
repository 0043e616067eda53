"""Models, split into trunk and head: a preset with random weights, a checkpoint folder, a hub id or a GGUF file."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlhfkernels.config.case import Case
from rlhfkernels.errors import ModelError
from rlhfkernels.models.heads import LmHead
from rlhfkernels.models.presets import PRESETS
from rlhfkernels.seeding import seeded

M = TypeVar("M", bound=nn.Module)
_POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length")
_DROPOUT_FIELDS = ("dropout", "pdrop", "layerdrop")


@dataclasses.dataclass(kw_only=True, slots=True)
class LoadedModel:
    """One base: the trunk, and the language-model head where it was asked for.

    Attributes:
        trunk: the model without its head; its forward returns ``last_hidden_state`` [b, t, d].
        lm_head: reads d, or ``None``.
        hidden_size: d, the width that heads read.
        vocab_size: v.
        prefix: the trunk's name inside the causal language model, as checkpoints and adapters spell it.
    """

    trunk: PreTrainedModel
    lm_head: LmHead | None
    hidden_size: int
    vocab_size: int
    prefix: str

    def clone(self) -> LoadedModel:
        """The same model in storage of its own; a tied head stays tied to its own trunk."""
        pair = nn.ModuleList([self.trunk] if self.lm_head is None else [self.trunk, self.lm_head])
        twins: list[Any] = list(clone_module(pair))
        return dataclasses.replace(self, trunk=twins[0], lm_head=twins[1] if len(twins) > 1 else None)


def load_model(
    case: Case, *, seed: int, with_lm_head: bool, with_weights: bool = True, name: str | None = None
) -> LoadedModel:
    """Builds or loads a model of ``case`` on its device, in its dtype, with dropout off.

    Args:
        case: names the device, the dtype and the attention implementation.
        seed: of random weights; ignored where there are real ones.
        with_lm_head: keep the language-model head.
        with_weights: load real weights where there are some; without, only the model's configuration is read.
        name: which model; ``None`` is the policy's.

    Raises:
        ModelError: the model is unknown, cannot be loaded, or is too short for the case.
    """
    device = torch.device(case.device)
    dtype = getattr(torch, case.dtype)
    name = name or case.model
    config, source = _read_config(name)
    _check_positions(case, name, config)
    for field in list(vars(config)):
        if any(field.endswith(ending) for ending in _DROPOUT_FIELDS) and isinstance(getattr(config, field), float):
            setattr(config, field, 0.0)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": case.options.engine.attn_implementation}
    if source is None or not with_weights:
        with seeded(device, seed), device:
            model = _loading(name, AutoModelForCausalLM.from_config, config, **options)
    else:
        load = AutoModelForCausalLM.from_pretrained
        model = _loading(name, load, *source.args, config=config, **source.kwargs, **options).to(device)
    model.eval().requires_grad_(False)
    return _split(model, with_lm_head)


def clone_module(module: M) -> M:
    """A copy that owns the storage of its tensors, ties kept; ``copy.deepcopy`` alone cannot copy fake tensors."""
    tensors = {id(t): t for each in module.modules() for t in _tensors_of(each)}
    memo: dict[int, Any] = {}
    for key, tensor in tensors.items():
        twin = tensor.detach().clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[key] = nn.Parameter(twin, requires_grad=tensor.requires_grad) if is_parameter else twin
    return copy.deepcopy(module, memo)


def _tensors_of(module: nn.Module) -> list[torch.Tensor]:
    held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    return [tensor for tensor in held if isinstance(tensor, torch.Tensor)]


def load_tokenizer(model: str) -> Any | None:
    """The model's tokenizer, or ``None`` for a preset, which has none.

    Raises:
        ModelError: the model is no preset and has no tokenizer.
    """
    if model in PRESETS:
        return None
    source = _source(model)
    return _loading(model, AutoTokenizer.from_pretrained, *source.args, **source.kwargs)


def max_positions(config: Any) -> int | None:
    """The longest sequence a configuration allows, or ``None`` where it states none."""
    found = [getattr(config, field, None) for field in _POSITION_FIELDS]
    return next((int(value) for value in found if isinstance(value, int)), None)


@dataclasses.dataclass(frozen=True, slots=True)
class _Source:
    """The arguments with which ``from_pretrained`` finds a model that is no preset."""

    args: tuple[str, ...]
    kwargs: dict[str, Any]


def _source(model: str) -> _Source:
    path = Path(model)
    if path.suffix == ".gguf":
        return _Source((str(path.parent),), {"gguf_file": path.name})
    return _Source((model,), {})


def _read_config(model: str) -> tuple[Any, _Source | None]:
    if model in PRESETS:
        preset = PRESETS[model]
        return AutoConfig.for_model(preset.model_type, **preset.config), None
    source = _source(model)
    return _loading(model, AutoConfig.from_pretrained, *source.args, **source.kwargs), source


def _loading(model: str, load: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls ``load``; what goes wrong in it is the user's model or network, said in one sentence."""
    noise = logging.getLogger("transformers")
    level = noise.level
    noise.setLevel(logging.ERROR)
    try:
        return load(*args, **kwargs)
    except ImportError as error:
        raise ModelError(f"model {model!r} needs a package that is not installed: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if "attention implementation" in str(error):
            asked = kwargs.get("attn_implementation")
            raise ModelError(
                f"model {model!r} has no {asked} attention: set engine.attn_implementation to another (eager always "
                "works)."
            ) from error
        if not Path(model).exists():
            raise ModelError(
                f"model {model!r} could not be fetched: it is no local folder or file, and the hub was not reached "
                f"or does not hold it ({_first_line(error)})"
            ) from error
        raise ModelError(f"model {model!r} could not be loaded: {_first_line(error)}") from error
    finally:
        noise.setLevel(level)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:300] or type(error).__name__


def _check_positions(case: Case, model: str, config: Any) -> None:
    limit = max_positions(config)
    if limit is not None and case.seq_len > limit:
        raise ModelError(
            f"prompt_len + completion_len is {case.seq_len}: model {model!r} has {limit} positions at most."
        )


def _split(model: Any, with_lm_head: bool) -> LoadedModel:
    trunk = model.base_model
    embedding: Any = model.get_output_embeddings()
    if trunk is model or getattr(embedding, "weight", None) is None:
        raise ModelError(f"architecture {type(model).__name__} has no linear language-model head over a trunk.")
    vocab_size, hidden_size = embedding.weight.shape
    config = model.config
    head = None
    if with_lm_head:
        head = LmHead(
            embedding.weight,
            getattr(embedding, "bias", None),
            scale=_logit_scale(config),
            softcap=getattr(config, "final_logit_softcapping", None),
        )
    return LoadedModel(
        trunk=trunk, lm_head=head, hidden_size=hidden_size, vocab_size=vocab_size, prefix=model.base_model_prefix
    )


def _logit_scale(config: Any) -> float:
    """What multiplies the logits after the head: Cohere's ``logit_scale``, one over Granite's ``logits_scaling``."""
    if getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)
    return float(getattr(config, "logit_scale", None) or 1.0)
