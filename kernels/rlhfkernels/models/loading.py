"""Models, split into trunk and head: a preset with random weights, a checkpoint folder, a hub id or a GGUF file."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlhfkernels.config.case import Case
from rlhfkernels.config.rules import shown
from rlhfkernels.errors import ModelError
from rlhfkernels.models.cache import has_other_states
from rlhfkernels.models.faults import AttentionError, forward_errors, loading_errors
from rlhfkernels.models.heads import LmHead
from rlhfkernels.models.presets import PRESETS
from rlhfkernels.seeding import seeded

M = TypeVar("M", bound=nn.Module)
_POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length")
# Parts of the names of configuration fields that make a forward pass in train mode random.
_NOISE_FIELDS = ("dropout", "pdrop", "layerdrop", "jitter")
# Fields that this package reads. An architecture that does not declare one keeps any value of it.
_NUMBER_FIELDS = (
    "head_dim", "num_key_value_heads", "sliding_window", "final_logit_softcapping", "logits_scaling", "logit_scale",
)  # fmt: skip
# Fields of which one is the number of experts of a layer.
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_NUM_PROBE_TOKENS = 8
# Tensors of a checkpoint that no forward pass of a causal language model misses, beside those that transformers itself
# lists: masks and rotary tables that older versions saved and newer ones compute, and heads for other tasks.
_HARMLESS_TENSORS = re.compile(
    r"(^|\.)(attn|attention)\.(masked_)?bias$|(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(^|\.)position_ids$"
    r"|^(score|classifier|classification_head|qa_outputs|v_head|value_head|reward_head)\."
)
# Rotary embeddings whose frequencies depend on the sequence length.
LENGTH_DEPENDENT_ROTARY = ("dynamic", "longrope")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """The output of transformers' own forward on a few tokens.

    Attributes:
        tokens: [1, t].
        output: the logits [1, t, v] of the causal language model, or the hidden states [1, t, d] of its trunk where
            the head was not asked for.
    """

    tokens: torch.Tensor
    output: torch.Tensor


@dataclasses.dataclass(kw_only=True, slots=True)
class LoadedModel:
    """One base: the trunk, and the language-model head where it was asked for.

    Attributes:
        trunk: the model without its head; its forward returns ``last_hidden_state`` [b, t, d].
        lm_head: reads d, or ``None``.
        hidden_size: d, the width that heads read.
        vocab_size: v.
        prefix: the trunk's name inside the causal language model, as checkpoints and adapters spell it.
        probe: for the check of the engine; ``None`` once checked, and for a clone.
    """

    trunk: PreTrainedModel
    lm_head: LmHead | None
    hidden_size: int
    vocab_size: int
    prefix: str
    probe: Probe | None = None

    @property
    def has_experts(self) -> bool:
        """True for a mixture of experts, of which a batch may miss some."""
        return any(getattr(self.trunk.config, name, None) for name in _EXPERT_FIELDS)

    @property
    def attention(self) -> str:
        """The attention implementation that runs: ``sdpa`` or ``eager``."""
        return str(self.trunk.config._attn_implementation)

    def clone(self) -> LoadedModel:
        """The same model in storage of its own; a tied head stays tied to its own trunk."""
        pair = nn.ModuleList([self.trunk] if self.lm_head is None else [self.trunk, self.lm_head])
        twins: list[Any] = list(clone_module(pair))
        return dataclasses.replace(self, trunk=twins[0], lm_head=twins[1] if len(twins) > 1 else None, probe=None)


def load_model(
    case: Case,
    *,
    seed: int,
    with_lm_head: bool,
    with_weights: bool = True,
    name: str | None = None,
    num_layers: int | None = None,
) -> LoadedModel:
    """Builds or loads a model of ``case`` on its device, in its dtype, with dropout off.

    Args:
        case: names the device, the dtype and the attention implementation.
        seed: of random weights; ignored where there are real ones.
        with_lm_head: keep the language-model head.
        with_weights: load real weights where there are some; without, only the model's configuration is read.
        name: which model; ``None`` is the policy's.
        num_layers: build a model without weights with its first layers alone; see ``rlhfkernels.models.depth``.

    Raises:
        ModelError: the model is unknown, cannot be loaded, or is too short for the case.
    """
    name = name or case.model
    model = load_causal_lm(
        case, name, seed=seed, with_lm_head=with_lm_head, with_weights=with_weights, num_layers=num_layers
    )
    with loading_errors(name):  # fields of the configuration that transformers does not check
        loaded = _split(model, with_lm_head)
    if with_weights:
        loaded.probe = _make_probe(name, model, case, with_lm_head)
    return loaded


def load_causal_lm(
    case: Case,
    name: str,
    *,
    seed: int,
    with_lm_head: bool = True,
    with_weights: bool = True,
    num_layers: int | None = None,
) -> PreTrainedModel:
    """Loads transformers' own causal language model; arguments as in ``load_model``.

    Raises:
        ModelError: as in ``load_model``; or the checkpoint lacks weights that the case reads, or has weights that the
            architecture has no place for.
    """
    device = torch.device(case.device)
    config, source = _read_config(name)
    _check_architecture(name, config)
    _check_numbers(name, config)
    _check_positions(case, name, config)
    for field, value in list(vars(config).items()):
        if any(part in field for part in _NOISE_FIELDS) and type(value) in (int, float):
            setattr(config, field, 0.0)
    if num_layers is not None:
        assert not with_weights, "the weights of a checkpoint have one depth"
        cut_layers(config, num_layers)
    options: dict[str, Any] = {"dtype": getattr(torch, case.dtype), "asked": case.options.engine.attn_implementation}
    if source is None or not with_weights:
        with seeded(device, seed), device:
            model = with_attention(name, AutoModelForCausalLM.from_config, config, **options)
    else:
        load = AutoModelForCausalLM.from_pretrained
        options |= {"config": config, **source.kwargs, "output_loading_info": True}
        model, info = with_attention(name, load, *source.args, **options)
        _check_weights(name, model, info, with_lm_head)
        model = model.to(device)
    with loading_errors(name):
        keeps_other_states = has_other_states(model)
    if keeps_other_states:
        raise ModelError(
            f"model {name!r} keeps states beside keys and values ({config.model_type}), which padding and the KV cache "
            "of generation would spoil: it must have attention layers alone."
        )
    model.eval().requires_grad_(False)
    return model


def with_attention(name: str, load: Any, *args: Any, asked: str, **kwargs: Any) -> Any:
    """Loads with the attention that the case asks for; ``auto`` is sdpa if the architecture has it, else eager."""
    for implementation in ("sdpa", "eager") if asked == "auto" else (asked,):
        try:
            return _loading(name, load, *args, attn_implementation=implementation, **kwargs)
        except AttentionError:
            if asked != "auto" or implementation == "eager":
                raise
    raise AssertionError("the last attention returns or raises")


def cut_layers(config: Any, num_layers: int) -> None:
    """Makes ``config`` that of the first ``num_layers`` layers, lists with one item a layer included."""
    whole = config.num_hidden_layers
    for field, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == whole:
            setattr(config, field, value[:num_layers])
    config.num_hidden_layers = num_layers


def _check_architecture(model: str, config: Any) -> None:
    """Refuses what is no decoder of text alone."""
    if config.get_text_config() is not config:
        raise ModelError(f"model {model!r} is multimodal ({config.model_type}): it must read text alone.")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model {model!r} has an encoder ({config.model_type}): it must be a decoder alone.")


def _check_numbers(model: str, config: Any) -> None:
    """Refuses fields that are no finite numbers. ``None`` is the architecture's default; a list has one a layer."""
    for field in _NUMBER_FIELDS:
        value = getattr(config, field, None)
        each = value if isinstance(value, list) and value else [value]
        if any(v is not None and not (isinstance(v, (int, float)) and math.isfinite(v)) for v in each):
            raise ModelError(f"model {model!r} has {field} {shown(value)} in its config: it must be a finite number.")


def _check_weights(name: str, model: Any, info: Mapping[str, Iterable[str]], with_lm_head: bool) -> None:
    """Refuses a checkpoint whose weights are not the model's: transformers fills gaps at random and drops the rest."""
    head = model.get_output_embeddings()
    is_unread = head is not None and not with_lm_head
    unread = {id(parameter) for parameter in head.parameters()} if is_unread else set()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = info["missing_keys"]
    lacking = sorted(key for key in missing if key not in parameters or id(parameters[key]) not in unread)
    if lacking:
        raise ModelError(f"model {name!r} lacks weights: its checkpoint has no {_some(lacking)}.")
    owner = next((f"{key}." for key, module in model.named_modules() if module is head), "") if is_unread else ""
    surplus = sorted(
        key
        for key in info["unexpected_keys"]
        if not _HARMLESS_TENSORS.search(key) and not (owner and key.startswith(owner))
    )
    if surplus:
        raise ModelError(
            f"model {name!r} has weights that {type(model).__name__} has no place for: {_some(surplus)}; "
            "its config.json must describe its checkpoint."
        )


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


@torch.no_grad()
def _make_probe(name: str, model: Any, case: Case, with_lm_head: bool) -> Probe:
    """Runs transformers' own forward on a few tokens that differ."""
    size = min(_NUM_PROBE_TOKENS, case.seq_len)
    vocab_size = model.get_output_embeddings().weight.shape[0]
    tokens = (torch.arange(size, device=case.device) * 7 + 3).remainder_(vocab_size)[None]
    with forward_errors(name, type(model).__name__):
        if with_lm_head:
            output = model(input_ids=tokens, use_cache=False).logits
        else:
            output = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    return Probe(tokens=tokens, output=output)


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


def read_max_positions(model: str) -> int | None:
    """Reads the longest sequence that a model allows, or ``None`` where its configuration states none.

    Raises:
        ModelError: the model is unknown.
    """
    return max_positions(read_config(model))


def read_config(model: str) -> Any:
    """Reads the configuration of a model.

    Raises:
        ModelError: the model is unknown.
    """
    return _read_config(model)[0]


def rotary_limit(config: Any) -> int | None:
    """Returns the longest sequence for which the rotary embedding stays the same; ``None`` if it always does."""
    rotary = getattr(config, "rope_parameters", None) or {}
    kinds = [each for each in (rotary, *rotary.values()) if isinstance(each, dict)]  # some have one for each layer type
    changing = [each for each in kinds if each.get("rope_type") in LENGTH_DEPENDENT_ROTARY]
    limits = [each.get("original_max_position_embeddings") or max_positions(config) for each in changing]
    return min((int(limit) for limit in limits if limit), default=None)


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
    with loading_errors(model, kwargs.get("attn_implementation")):
        return load(*args, **kwargs)


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
    head = None
    if with_lm_head:
        bias = getattr(embedding, "bias", None)
        softcap = getattr(model.config, "final_logit_softcapping", None)
        head = LmHead(embedding.weight, bias, scale=_logit_scale(model.config), softcap=softcap)
    return LoadedModel(
        trunk=trunk, lm_head=head, hidden_size=hidden_size, vocab_size=vocab_size, prefix=model.base_model_prefix
    )


def _logit_scale(config: Any) -> float:
    """Returns the factor of the logits after the head.

    The configuration's fields mean different things by architecture. The engine's check at loading refuses those that
    this function does not know.
    """
    kind = config.model_type
    if kind == "mpt":  # has the field; its model does not read it
        return 1.0
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides by it, MiniCPM3 too
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    return scale * (scaling if kind == "hyperclovax" else 1.0 / scaling)
