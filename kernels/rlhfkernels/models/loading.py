"""Models, split into trunk and head: a preset with random weights, a checkpoint, a model of a hub, a GGUF file."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlhfkernels.config.case import Case
from rlhfkernels.errors import ModelError
from rlhfkernels.models.cache import has_other_states
from rlhfkernels.models.checkpoint import check_weights
from rlhfkernels.models.cloning import clone_module
from rlhfkernels.models.configuration import check_config, cut_layers, logit_scale, pretrained, read_config, silence
from rlhfkernels.models.errors import AttentionError, check_softcap, forward_errors, loading_errors
from rlhfkernels.models.fields import EXPERT_FIELDS
from rlhfkernels.models.heads import LmHead
from rlhfkernels.models.presets import PRESETS
from rlhfkernels.seeding import seeded

_NUM_PROBE_TOKENS = 8


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
        return any(getattr(self.trunk.config, name, None) for name in EXPERT_FIELDS)

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
    config = read_config(name)
    check_config(name, config, case.seq_len)
    silence(config)
    if num_layers is not None:
        assert not with_weights, "the weights of a checkpoint have one depth"
        cut_layers(config, num_layers)
    options: dict[str, Any] = {"dtype": getattr(torch, case.dtype), "asked": case.options.engine.attn_implementation}
    if name in PRESETS or not with_weights:
        with seeded(device, seed), device:
            model = with_attention(name, AutoModelForCausalLM.from_config, config, **options)
    else:
        options |= {"output_loading_info": True, **pretrained(name)}
        model, info = with_attention(name, _from_pretrained, config, **options)
        check_weights(name, model, info, with_lm_head)
        model = model.to(device)
    with loading_errors(name):
        keeps_other_states = has_other_states(model)
    if keeps_other_states:
        raise ModelError(
            f"model {name!r} keeps states beside keys and values ({config.model_type}), which padding and the KV cache "
            "of generation would spoil: it must have attention layers alone."
        )
    model.eval().requires_grad_(False)
    _fix_dynamic_rotary(model)
    return model


def _fix_dynamic_rotary(model: nn.Module) -> None:
    """Makes dynamic rotary embeddings plain ones.

    Lengths stay within the model's positions, where its frequencies never change. transformers would compare them in
    every forward: a wait for the device, and impossible on the fake tensors of a plan.
    """
    module: Any
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if kind == "dynamic":
            module.rope_type = "default"
        elif isinstance(kind, dict):  # of each layer type
            module.rope_type = {name: "default" if each == "dynamic" else each for name, each in kind.items()}


def with_attention(name: str, load: Any, config: Any, *, asked: str, **kwargs: Any) -> Any:
    """Loads with the attention that the case asks for; ``auto`` is sdpa if the architecture has it, else eager."""
    for implementation in ("sdpa", "eager") if asked == "auto" else (asked,):
        try:
            check_softcap(name, config, implementation)
            with loading_errors(name, implementation):
                return load(config, attn_implementation=implementation, **kwargs)
        except AttentionError:
            if asked != "auto" or implementation == "eager":
                raise
    raise AssertionError("the last attention returns or raises")


def _from_pretrained(config: Any, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(config=config, **kwargs)


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


def load_tokenizer(model: str) -> Any | None:
    """The model's tokenizer, or ``None`` for a preset, which has none.

    Raises:
        ModelError: the model is no preset and has no tokenizer.
    """
    if model in PRESETS:
        return None
    with loading_errors(model):
        return AutoTokenizer.from_pretrained(**pretrained(model))


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
        head = LmHead(embedding.weight, bias, scale=logit_scale(model.config), softcap=softcap)
    return LoadedModel(
        trunk=trunk, lm_head=head, hidden_size=hidden_size, vocab_size=vocab_size, prefix=model.base_model_prefix
    )
