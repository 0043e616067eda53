"""What the fast path knows of an architecture: which weights of which modules a layer is made of, and how it uses them.

Nothing is copied. Products over the same input become one: their weights are moved into one storage, of which each
module keeps its slice as its own parameter, so modules, adapters and optimizers go on as before.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.activations import GELUActivation, NewGELUActivation, SiLUActivation
from transformers.pytorch_utils import Conv1D

from rlhfkernels.models.loading import LENGTH_DEPENDENT_ROTARY
from rlhfkernels.ops.heads import Heads
from rlhfkernels.ops.lora_linear import LinearGroup, LoraPart, lora_linear
from rlhfkernels.ops.rms_norm import rms_norm
from rlhfkernels.ops.rotary import signed
from rlhfkernels.ops.skinny_linear import SkinnyLoraLinear


class Projection:
    """Linear layers that read the same input, as one product each for the base and for the adapters' first halves.

    Args:
        modules: the layers, each plain or with PEFT's adapters around it; their outputs stand one after the other.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._lora = [module if isinstance(module, LoraLayer) else None for module in modules]
        bases: list[Any] = [module.get_base_layer() if isinstance(module, LoraLayer) else module for module in modules]
        self._transposed = isinstance(bases[0], Conv1D)
        sizes = [base.weight.shape[1 if self._transposed else 0] for base in bases]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._weight = _fuse(bases, "weight")
        self._bias = _fuse(bases, "bias") if getattr(bases[0], "bias", None) is not None else None
        names = {name for layer in self._lora if layer is not None for name in layer.lora_A}
        self._bare = self._group(bases, None)
        self._groups = {name: self._group(bases, name) for name in names}

    def _group(self, bases: Sequence[Any], adapter: str | None) -> LinearGroup:
        """The layers under one adapter set, for products of many rows."""
        chosen = [(layer, start) for layer, start in zip(self._lora, self._starts, strict=True) if layer is not None]
        chosen = [(layer, start) for layer, start in chosen if adapter in layer.lora_A]
        down = up = None
        if chosen:
            down = _fuse([layer.lora_A[adapter] for layer, _ in chosen], "weight")
            up = _fuse([layer.lora_B[adapter] for layer, _ in chosen], "weight")
        return LinearGroup(
            weight=self._weight.t() if self._transposed else self._weight,
            bias=self._bias,
            weights=tuple(base.weight for base in bases),
            biases=tuple(base.bias for base in bases) if self._bias is not None else (),
            transposed=self._transposed,
            down=down,
            up=up,
            parts=tuple(
                LoraPart(
                    down=layer.lora_A[adapter].weight,
                    up=layer.lora_B[adapter].weight,
                    start=start,
                    scaling=float(layer.scaling[adapter]),
                )
                for layer, start in chosen
            ),
        )

    def under(self, adapter: str | None) -> LinearGroup:
        """The layers under an adapter set, or bare."""
        return self._bare if adapter is None else self._groups.get(adapter, self._bare)

    def many(self, x: torch.Tensor, adapter: str | None, kernels: str) -> torch.Tensor:
        """[m, k] to [m, n] under ``adapter``, with a graph where one is asked for; ``kernels`` as in ``product``."""
        return lora_linear(x, self.under(adapter), kernels=kernels)

    def few(self, adapter: str | None, rows: int, buffers: dict[int, torch.Tensor]) -> SkinnyLoraLinear:
        """The layers under ``adapter`` for ``rows`` rows a call, without a graph."""
        return SkinnyLoraLinear(self.under(adapter), rows, buffers)


def _fuse(modules: Sequence[Any], name: str) -> torch.Tensor:
    """Moves the parameter ``name`` of every module into one storage, along the first dimension; returns the whole."""
    parameters: list[nn.Parameter] = [getattr(module, name) for module in modules]
    if len(parameters) == 1:
        return parameters[0].detach()
    with torch.no_grad():
        whole = torch.cat([p.detach() for p in parameters])
    start = 0
    for module, parameter in zip(modules, parameters, strict=True):
        end = start + parameter.shape[0]
        setattr(module, name, nn.Parameter(whole[start:end], requires_grad=parameter.requires_grad))
        start = end
    return whole


class Norm:
    """A root-mean-square norm, without the copies that transformers' makes and keeps, or a layer norm.

    Args:
        module: holds the weights.
        kernels: see ``Blocks``.

    Attributes:
        eps: added to the mean square, or to the variance.
        centred: the mean is taken off: a layer norm.
    """

    def __init__(self, module: nn.Module, kernels: str) -> None:
        self._module: Any = module
        self._kernels = kernels
        self.centred = isinstance(module, nn.LayerNorm)
        self.eps: float = getattr(module, "eps" if self.centred else "variance_epsilon")

    @property
    def weight(self) -> torch.Tensor | None:
        """[d]."""
        weight: torch.Tensor | None = self._module.weight
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """[d], of a layer norm that has one."""
        return getattr(self._module, "bias", None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] to [..., d]."""
        if self.centred:
            y: torch.Tensor = self._module(x)
            return y
        return rms_norm(x, self._module.weight, self.eps, kernels=self._kernels)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One layer.

    Attributes:
        norm_1: before attention; [..., d] to [..., d].
        qkv: d to the queries, keys and values.
        heads: how the outputs of ``qkv`` are heads.
        out: the attention's output projection.
        norm_2: before the feed-forward part.
        up: d to the feed-forward width; gate first, then up, where it is gated.
        activation: of the gate, or of what ``up`` gives.
        gated: whether the activated gate multiplies the rest.
        down: back to d.
        parallel: both parts read the layer's input (GPT-NeoX).
        window: how many positions a query sees, itself included; ``None`` is all.
    """

    norm_1: Norm
    qkv: Projection
    heads: Heads
    out: Projection
    norm_2: Norm
    up: Projection
    activation: Callable[[torch.Tensor], torch.Tensor]
    gated: bool
    down: Projection
    parallel: bool = False
    window: int | None = None

    @property
    def projections(self) -> tuple[Projection, Projection, Projection, Projection]:
        """``qkv``, ``out``, ``up`` and ``down``."""
        return self.qkv, self.out, self.up, self.down


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """A whole trunk.

    Attributes:
        embed: token ids [...] and position ids that broadcast to them to [..., d].
        rotary: the module that gives cosines and sines, or ``None`` for learned positions.
        layers: the layers.
        norm: after the last layer.
        scale: of the attention scores.
        kernels: how ops are computed, as in ``takes_triton`` and ``takes_native``.
    """

    embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    rotary: nn.Module | None
    layers: list[Block]
    norm: Norm
    scale: float
    kernels: str

    def turns(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and signed sines, [1 or b, t, s] each, of position ids [1 or b, t] for states like ``x``."""
        if self.rotary is None:
            return None
        cos, sin = self.rotary(x, ids)
        return cos, signed(sin)

    def turn_table(self, x: torch.Tensor, max_len: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """``turns`` of every position below ``max_len``, [max_len, s] each."""
        turns = self.turns(x, torch.arange(max_len, device=x.device)[None])
        return None if turns is None else (turns[0][0], turns[1][0])


gelu_tanh = functools.partial(nn.functional.gelu, approximate="tanh")


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _llama(trunk: Any, kernels: str) -> Blocks | None:
    config = trunk.config
    if getattr(trunk.rotary_emb, "rope_type", "default") in LENGTH_DEPENDENT_ROTARY:
        return None
    size = _head_size(config)
    heads = Heads(config.num_attention_heads, config.num_key_value_heads, size)
    layers = []
    for layer in trunk.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layers.append(
            Block(
                norm_1=Norm(layer.input_layernorm, kernels),
                qkv=Projection([attention.q_proj, attention.k_proj, attention.v_proj]),
                heads=heads,
                out=Projection([attention.o_proj]),
                norm_2=Norm(layer.post_attention_layernorm, kernels),
                up=Projection([mlp.gate_proj, mlp.up_proj]),
                activation=_activation(mlp.act_fn),
                gated=True,
                down=Projection([mlp.down_proj]),
                window=_window(attention, config),
            )
        )
    return Blocks(
        embed=lambda tokens, positions: trunk.embed_tokens(tokens),
        rotary=trunk.rotary_emb,
        layers=layers,
        norm=Norm(trunk.norm, kernels),
        scale=size**-0.5,
        kernels=kernels,
    )


def _window(attention: Any, config: Any) -> int | None:
    """A layer's own window where layers differ (Qwen2), else the configuration's for all (Mistral)."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[no-any-return]
    return config.sliding_window if config.model_type == "mistral" else None


# Modules by the function that they are; GPT-2's is spelt as eight small ops there, all of them kept for the backward.
_FUNCTIONS: dict[type[nn.Module], Callable[[torch.Tensor], torch.Tensor]] = {
    nn.SiLU: nn.functional.silu,
    SiLUActivation: nn.functional.silu,
    NewGELUActivation: gelu_tanh,
    GELUActivation: nn.functional.gelu,
    nn.ReLU: nn.functional.relu,
}


def _activation(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The module's activation."""
    return _FUNCTIONS.get(type(module), module)


def _gpt_neox(trunk: Any, kernels: str) -> Blocks | None:
    config = trunk.config
    if trunk.rotary_emb.rope_type in LENGTH_DEPENDENT_ROTARY:
        return None
    size = config.hidden_size // config.num_attention_heads
    layers = [
        Block(
            norm_1=Norm(layer.input_layernorm, kernels),
            qkv=Projection([layer.attention.query_key_value]),
            heads=Heads(config.num_attention_heads, config.num_attention_heads, size, interleaved=True),
            out=Projection([layer.attention.dense]),
            norm_2=Norm(layer.post_attention_layernorm, kernels),
            up=Projection([layer.mlp.dense_h_to_4h]),
            activation=_activation(layer.mlp.act),
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
        norm=Norm(trunk.final_layer_norm, kernels),
        scale=size**-0.5,
        kernels=kernels,
    )


def _opt(trunk: Any, kernels: str) -> Blocks | None:
    decoder, config = trunk.decoder, trunk.config
    if not config.do_layer_norm_before or decoder.project_in is not None or decoder.final_layer_norm is None:
        return None
    size = config.hidden_size // config.num_attention_heads
    heads = Heads(config.num_attention_heads, config.num_attention_heads, size)
    learned = decoder.embed_positions
    layers = []
    for layer in decoder.layers:
        attention = layer.self_attn
        layers.append(
            Block(
                norm_1=Norm(layer.self_attn_layer_norm, kernels),
                qkv=Projection([attention.q_proj, attention.k_proj, attention.v_proj]),
                heads=heads,
                out=Projection([attention.out_proj]),
                norm_2=Norm(layer.final_layer_norm, kernels),
                up=Projection([layer.fc1]),
                activation=_activation(layer.activation_fn),
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
        norm=Norm(decoder.final_layer_norm, kernels),
        scale=size**-0.5,
        kernels=kernels,
    )


def _gpt2(trunk: Any, kernels: str) -> Blocks | None:
    config = trunk.config
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx or config.add_cross_attention:
        return None
    size = config.n_embd // config.n_head
    layers = [
        Block(
            norm_1=Norm(layer.ln_1, kernels),
            qkv=Projection([layer.attn.c_attn]),
            heads=Heads(config.n_head, config.n_head, size),
            out=Projection([layer.attn.c_proj]),
            norm_2=Norm(layer.ln_2, kernels),
            up=Projection([layer.mlp.c_fc]),
            activation=_activation(layer.mlp.act),
            gated=False,
            down=Projection([layer.mlp.c_proj]),
        )
        for layer in trunk.h
    ]
    return Blocks(
        embed=lambda tokens, positions: trunk.wte(tokens) + trunk.wpe(positions),
        rotary=None,
        layers=layers,
        norm=Norm(trunk.ln_f, kernels),
        scale=size**-0.5,
        kernels=kernels,
    )


# How each architecture that the fast path covers is read. ``None`` from a reader: this configuration it does not know.
READERS: dict[str, Callable[[Any, str], Blocks | None]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "gpt2": _gpt2,
}


def read_blocks(trunk: Any, kernels: str) -> Blocks | None:
    """The layers of ``trunk`` for the fast path, or ``None`` where it does not cover the model.

    Args:
        trunk: the model.
        kernels: see ``Blocks``.
    """
    reader = READERS.get(trunk.config.model_type)
    return None if reader is None else reader(trunk, kernels)
