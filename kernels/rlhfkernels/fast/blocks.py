"""What the fast path knows of an architecture: which weights of which modules a layer is made of, and how it uses them.

Nothing is copied. Products over the same input become one: their weights are moved into one storage, of which each
module keeps its slice as its own parameter, so modules, adapters and optimizers go on as before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhfkernels.ops.skinny_linear import skinny_linear


class Projection:
    """Linear layers that read the same input, as one product each for the base and for the adapters' first halves.

    Args:
        modules: the layers, each plain or with PEFT's adapters around it; their outputs stand one after the other.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._lora = [module if isinstance(module, LoraLayer) else None for module in modules]
        bases: list[Any] = [module.get_base_layer() if isinstance(module, LoraLayer) else module for module in modules]
        self._base = bases[0]
        self._transposed = isinstance(self._base, Conv1D)
        sizes = [base.weight.shape[1 if self._transposed else 0] for base in bases]
        self._ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        self.num_outputs = self._ends[-1]
        self._weight = bases[0].weight if len(bases) == 1 else _fuse(bases, "weight")
        has_bias = getattr(bases[0], "bias", None) is not None
        self._bias = None
        if has_bias:
            self._bias = bases[0].bias if len(bases) == 1 else _fuse(bases, "bias")
        self._first: dict[str, torch.Tensor] = {}
        for name in {name for layer in self._lora if layer is not None for name in layer.lora_A}:
            firsts = [layer.lora_A[name] for layer in self._lora if layer is not None and name in layer.lora_A]
            self._first[name] = firsts[0].weight if len(firsts) == 1 else _fuse(firsts, "weight")

    def __call__(self, x: torch.Tensor, adapter: str | None) -> torch.Tensor:
        """[b, i] to [o, b] under ``adapter``; without a graph."""
        y = torch.mm(x, self._weight).t() if self._transposed else skinny_linear(x, self._weight)
        if self._bias is not None:
            y = y + self._bias[:, None]
        if adapter is None or adapter not in self._first:
            return y
        first = self._first[adapter]
        low = skinny_linear(x.to(first.dtype), first)
        start = done = 0
        for layer, end in zip(self._lora, self._ends, strict=True):
            if layer is not None and adapter in layer.lora_B:
                second, scaling = layer.lora_B[adapter].weight, layer.scaling[adapter]
                rank = second.shape[1]
                part = low[done : done + rank]
                done += rank
                if second.dtype == y.dtype:
                    y[start:end].addmm_(second, part, alpha=scaling)
                else:
                    y[start:end] += torch.mm(second, part).mul_(scaling)
            start = end
        return y


def _fuse(modules: Sequence[Any], name: str) -> torch.Tensor:
    """Moves the parameter ``name`` of every module into one storage, along the first dimension."""
    parameters: list[nn.Parameter] = [getattr(module, name) for module in modules]
    with torch.no_grad():
        whole = torch.cat([p.detach() for p in parameters])
    start = 0
    for module, parameter in zip(modules, parameters, strict=True):
        end = start + parameter.shape[0]
        setattr(module, name, nn.Parameter(whole[start:end], requires_grad=parameter.requires_grad))
        start = end
    return whole


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One layer.

    Attributes:
        norm_1: before attention; [b, d] to [b, d].
        qkv: d to the queries, keys and values.
        split: the outputs of ``qkv``, [b, o], to query [b, h, e], key [b, k, e] and value [b, k, e].
        out: the attention's output projection.
        norm_2: before the feed-forward part.
        up: d to the feed-forward width; gate first, then up, where it is gated.
        activation: of the gate, or of what ``up`` gives.
        gated: whether the activated gate multiplies the rest.
        down: back to d.
        parallel: both parts read the layer's input (GPT-NeoX).
        window: how many positions a query sees, itself included; ``None`` is all.
    """

    norm_1: Callable[[torch.Tensor], torch.Tensor]
    qkv: Projection
    split: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    out: Projection
    norm_2: Callable[[torch.Tensor], torch.Tensor]
    up: Projection
    activation: Callable[[torch.Tensor], torch.Tensor]
    gated: bool
    down: Projection
    parallel: bool = False
    window: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """A whole trunk.

    Attributes:
        embed: token ids [b] and position ids [b] to [b, d].
        rotary: the module that gives cosines and sines, or ``None`` for learned positions.
        layers: the layers.
        norm: after the last layer.
        scale: of the attention scores.
    """

    embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    rotary: nn.Module | None
    layers: list[Block]
    norm: Callable[[torch.Tensor], torch.Tensor]
    scale: float


# Rotary tables that depend on how long the sequence has become.
_MOVING_ROTARY = ("dynamic", "longrope")


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _contiguous_heads(heads: int, kv_heads: int, size: int) -> Callable[[torch.Tensor], Any]:
    """Queries, then keys, then values."""
    ends = (heads, heads + kv_heads, heads + 2 * kv_heads)

    def split(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = y.view(y.shape[0], ends[2], size)
        return y[:, : ends[0]], y[:, ends[0] : ends[1]], y[:, ends[1] :]

    return split


def _interleaved_heads(heads: int, size: int) -> Callable[[torch.Tensor], Any]:
    """Head by head its query, key and value (GPT-NeoX)."""

    def split(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = y.view(y.shape[0], heads, 3, size).unbind(2)
        return q, k, v

    return split


def _llama(trunk: Any) -> Blocks | None:
    config = trunk.config
    if getattr(trunk.rotary_emb, "rope_type", "default") in _MOVING_ROTARY:
        return None
    size = _head_size(config)
    split = _contiguous_heads(config.num_attention_heads, config.num_key_value_heads, size)
    layers = []
    for layer in trunk.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layers.append(
            Block(
                norm_1=_rms_norm(layer.input_layernorm),
                qkv=Projection([attention.q_proj, attention.k_proj, attention.v_proj]),
                split=split,
                out=Projection([attention.o_proj]),
                norm_2=_rms_norm(layer.post_attention_layernorm),
                up=Projection([mlp.gate_proj, mlp.up_proj]),
                activation=mlp.act_fn,
                gated=True,
                down=Projection([mlp.down_proj]),
                window=_window(attention, config),
            )
        )
    return Blocks(
        embed=lambda tokens, positions: trunk.embed_tokens(tokens),
        rotary=trunk.rotary_emb,
        layers=layers,
        norm=_rms_norm(trunk.norm),
        scale=size**-0.5,
    )


def _window(attention: Any, config: Any) -> int | None:
    """A layer's own window where layers differ (Qwen2), else the configuration's for all (Mistral)."""
    found = attention if hasattr(attention, "sliding_window") else config
    return getattr(found, "sliding_window", None)


def _rms_norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The norm as one call of the library's, in place of the module's five."""
    shape, eps = tuple(module.weight.shape), module.variance_epsilon
    return lambda x: nn.functional.rms_norm(x, shape, module.weight, eps)


def _gpt_neox(trunk: Any) -> Blocks | None:
    config = trunk.config
    size = config.hidden_size // config.num_attention_heads
    layers = [
        Block(
            norm_1=layer.input_layernorm,
            qkv=Projection([layer.attention.query_key_value]),
            split=_interleaved_heads(config.num_attention_heads, size),
            out=Projection([layer.attention.dense]),
            norm_2=layer.post_attention_layernorm,
            up=Projection([layer.mlp.dense_h_to_4h]),
            activation=layer.mlp.act,
            gated=False,
            down=Projection([layer.mlp.dense_4h_to_h]),
            parallel=config.use_parallel_residual,
        )
        for layer in trunk.layers
    ]
    return Blocks(
        embed=lambda tokens, positions: trunk.embed_in(tokens),
        rotary=trunk.rotary_emb,
        layers=layers,
        norm=trunk.final_layer_norm,
        scale=size**-0.5,
    )


def _opt(trunk: Any) -> Blocks | None:
    decoder, config = trunk.decoder, trunk.config
    if not config.do_layer_norm_before or decoder.project_in is not None or decoder.final_layer_norm is None:
        return None
    size = config.hidden_size // config.num_attention_heads
    split = _contiguous_heads(config.num_attention_heads, config.num_attention_heads, size)
    learned = decoder.embed_positions
    layers = []
    for layer in decoder.layers:
        attention = layer.self_attn
        layers.append(
            Block(
                norm_1=layer.self_attn_layer_norm,
                qkv=Projection([attention.q_proj, attention.k_proj, attention.v_proj]),
                split=split,
                out=Projection([attention.out_proj]),
                norm_2=layer.final_layer_norm,
                up=Projection([layer.fc1]),
                activation=layer.activation_fn,
                gated=False,
                down=Projection([layer.fc2]),
            )
        )
    return Blocks(
        embed=lambda tokens, positions: (
            decoder.embed_tokens(tokens) + nn.functional.embedding(positions + learned.offset, learned.weight)
        ),
        rotary=None,
        layers=layers,
        norm=decoder.final_layer_norm,
        scale=size**-0.5,
    )


def _gpt2(trunk: Any) -> Blocks | None:
    config = trunk.config
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx or config.add_cross_attention:
        return None
    size = config.n_embd // config.n_head
    layers = [
        Block(
            norm_1=layer.ln_1,
            qkv=Projection([layer.attn.c_attn]),
            split=_contiguous_heads(config.n_head, config.n_head, size),
            out=Projection([layer.attn.c_proj]),
            norm_2=layer.ln_2,
            up=Projection([layer.mlp.c_fc]),
            activation=layer.mlp.act,
            gated=False,
            down=Projection([layer.mlp.c_proj]),
        )
        for layer in trunk.h
    ]
    return Blocks(
        embed=lambda tokens, positions: trunk.wte(tokens) + trunk.wpe(positions),
        rotary=None,
        layers=layers,
        norm=trunk.ln_f,
        scale=size**-0.5,
    )


# How each architecture that the fast path covers is read. ``None`` from a reader: this configuration it does not know.
READERS: dict[str, Callable[[Any], Blocks | None]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "gpt2": _gpt2,
}


def read_blocks(trunk: Any) -> Blocks | None:
    """The layers of ``trunk`` for the fast path, or ``None`` where it does not cover the model."""
    reader = READERS.get(trunk.config.model_type)
    return None if reader is None else reader(trunk)
