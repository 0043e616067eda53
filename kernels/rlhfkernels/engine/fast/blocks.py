"""Architectures of the fast trunk: the weights that a layer is made of, and how it uses them.

Linear layers that read the same input become one matmul: their weights move into one storage, of which each module
keeps its slice as its parameter. Modules, adapters and optimizers work as before.
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
from rlhfkernels.ops.lora_linear import LinearGroup, LoraPart, lora_linear
from rlhfkernels.ops.qkv_layout import QkvLayout
from rlhfkernels.ops.rms_norm import rms_norm
from rlhfkernels.ops.rotary import make_signed_sin
from rlhfkernels.ops.skinny_linear import SkinnyLoraLinear


class Projection:
    """Linear layers that read the same input, as one matmul for the bases and one for all adapters' A.

    Args:
        modules: the layers, each plain or wrapped by PEFT; their outputs are concatenated.
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
        """Makes the group of one adapter set, or of the bare layers."""
        adapted = [(layer, start) for layer, start in zip(self._lora, self._starts, strict=True) if layer is not None]
        adapted = [(layer, start) for layer, start in adapted if adapter in layer.lora_A]
        down = up = None
        if adapted:
            down = _fuse([layer.lora_A[adapter] for layer, _ in adapted], "weight")
            up = _fuse([layer.lora_B[adapter] for layer, _ in adapted], "weight")
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
                for layer, start in adapted
            ),
        )

    def under(self, adapter: str | None) -> LinearGroup:
        """Returns the layers with an adapter set, or bare."""
        return self._bare if adapter is None else self._groups.get(adapter, self._bare)

    def forward(self, x: torch.Tensor, adapter: str | None, backend: str) -> torch.Tensor:
        """Computes [m, n] of [m, k] with ``adapter``; ``backend`` as in ``matmul``."""
        return lora_linear(x, self.under(adapter), backend=backend)

    def for_decode(self, adapter: str | None, rows: int, buffers: dict[int, torch.Tensor]) -> SkinnyLoraLinear:
        """Returns the layers with ``adapter`` for ``rows`` rows a call, without a graph."""
        return SkinnyLoraLinear(self.under(adapter), rows, buffers)


def _fuse(modules: Sequence[Any], name: str) -> torch.Tensor:
    """Concatenates the parameter ``name`` of all modules in one storage, which each keeps a slice of; returns it."""
    parameters: list[nn.Parameter] = [getattr(module, name) for module in modules]
    if len(parameters) == 1:
        return parameters[0].detach()
    with torch.no_grad():
        fused = torch.cat([p.detach() for p in parameters])
    start = 0
    for module, parameter in zip(modules, parameters, strict=True):
        end = start + parameter.shape[0]
        setattr(module, name, nn.Parameter(fused[start:end], requires_grad=parameter.requires_grad))
        start = end
    return fused


class Norm:
    """An RMS norm, without the copies that transformers' makes and keeps, or a layer norm.

    Args:
        module: holds the weights.
        backend: see ``Blocks``.

    Attributes:
        eps: added to the mean square, or to the variance.
        centered: whether it is a layer norm.
    """

    def __init__(self, module: nn.Module, backend: str) -> None:
        self._module: Any = module
        self._backend = backend
        self.centered = isinstance(module, nn.LayerNorm)
        self.eps: float = getattr(module, "eps" if self.centered else "variance_epsilon")

    @property
    def weight(self) -> torch.Tensor | None:
        """[d]."""
        weight: torch.Tensor | None = self._module.weight
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """[d], or ``None``."""
        return getattr(self._module, "bias", None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalizes [..., d]."""
        if self.centered:
            y: torch.Tensor = self._module(x)
            return y
        return rms_norm(x, self._module.weight, self.eps, backend=self._backend)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One layer.

    Attributes:
        norm_1: before attention.
        qkv: projection to queries, keys and values.
        layout: of the heads in the output of ``qkv``.
        out: output projection of attention.
        norm_2: before the MLP.
        up: projection to the MLP's width; gate, then up, if gated.
        activation: of the gate, or of the output of ``up``.
        gated: whether the activated gate multiplies the rest.
        down: projection back to d.
        parallel: attention and MLP both read the layer's input (GPT-NeoX).
        window: positions that a query sees, itself included; ``None`` is all.
    """

    norm_1: Norm
    qkv: Projection
    layout: QkvLayout
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
        embed: (token ids [...], position ids that broadcast to them) to [..., d].
        rotary: module that computes cosines and sines, or ``None`` for learned positions.
        layers: the layers.
        norm: after the last layer.
        scale: of the attention scores.
        backend: of the ops, as in ``takes_triton`` and ``takes_native``.
    """

    embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    rotary: nn.Module | None
    layers: list[Block]
    norm: Norm
    scale: float
    backend: str

    def rotary_at(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns cosines and signed sines, [1 or b, t, s] each, of position ids [1 or b, t] in the dtype of ``x``."""
        if self.rotary is None:
            return None
        cos, sin = self.rotary(x, ids)
        return cos, make_signed_sin(sin)

    def rotary_table(self, x: torch.Tensor, max_len: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns cosines and signed sines of all positions below ``max_len``, [max_len, s] each."""
        tables = self.rotary_at(x, torch.arange(max_len, device=x.device)[None])
        return None if tables is None else (tables[0][0], tables[1][0])


gelu_tanh = functools.partial(nn.functional.gelu, approximate="tanh")


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _llama(trunk: Any, backend: str) -> Blocks | None:
    config = trunk.config
    if getattr(trunk.rotary_emb, "rope_type", "default") in LENGTH_DEPENDENT_ROTARY:
        return None
    size = _head_size(config)
    layout = QkvLayout(config.num_attention_heads, config.num_key_value_heads, size)
    layers = []
    for layer in trunk.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layers.append(
            Block(
                norm_1=Norm(layer.input_layernorm, backend),
                qkv=Projection([attention.q_proj, attention.k_proj, attention.v_proj]),
                layout=layout,
                out=Projection([attention.o_proj]),
                norm_2=Norm(layer.post_attention_layernorm, backend),
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
        norm=Norm(trunk.norm, backend),
        scale=size**-0.5,
        backend=backend,
    )


def _window(attention: Any, config: Any) -> int | None:
    """Returns the layer's own window where layers differ (Qwen2), else the configuration's (Mistral alone reads it)."""
    owner = config if config.model_type == "mistral" else attention
    return getattr(owner, "sliding_window", None)


# Activation modules and equal functions. GPT-2's module is eight small ops, all kept for the backward.
_FUNCTIONS: dict[type[nn.Module], Callable[[torch.Tensor], torch.Tensor]] = {
    nn.SiLU: nn.functional.silu,
    SiLUActivation: nn.functional.silu,
    NewGELUActivation: gelu_tanh,
    GELUActivation: nn.functional.gelu,
    nn.ReLU: nn.functional.relu,
}


def _activation(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return _FUNCTIONS.get(type(module), module)


def _gpt_neox(trunk: Any, backend: str) -> Blocks | None:
    config = trunk.config
    if trunk.rotary_emb.rope_type in LENGTH_DEPENDENT_ROTARY:
        return None
    size = config.hidden_size // config.num_attention_heads
    layers = [
        Block(
            norm_1=Norm(layer.input_layernorm, backend),
            qkv=Projection([layer.attention.query_key_value]),
            layout=QkvLayout(config.num_attention_heads, config.num_attention_heads, size, interleaved=True),
            out=Projection([layer.attention.dense]),
            norm_2=Norm(layer.post_attention_layernorm, backend),
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
        norm=Norm(trunk.final_layer_norm, backend),
        scale=size**-0.5,
        backend=backend,
    )


def _opt(trunk: Any, backend: str) -> Blocks | None:
    decoder, config = trunk.decoder, trunk.config
    if not config.do_layer_norm_before or decoder.project_in is not None or decoder.final_layer_norm is None:
        return None
    size = config.hidden_size // config.num_attention_heads
    layout = QkvLayout(config.num_attention_heads, config.num_attention_heads, size)
    learned = decoder.embed_positions
    layers = []
    for layer in decoder.layers:
        attention = layer.self_attn
        layers.append(
            Block(
                norm_1=Norm(layer.self_attn_layer_norm, backend),
                qkv=Projection([attention.q_proj, attention.k_proj, attention.v_proj]),
                layout=layout,
                out=Projection([attention.out_proj]),
                norm_2=Norm(layer.final_layer_norm, backend),
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
        norm=Norm(decoder.final_layer_norm, backend),
        scale=size**-0.5,
        backend=backend,
    )


def _gpt2(trunk: Any, backend: str) -> Blocks | None:
    config = trunk.config
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx or config.add_cross_attention:
        return None
    size = config.n_embd // config.n_head
    layers = [
        Block(
            norm_1=Norm(layer.ln_1, backend),
            qkv=Projection([layer.attn.c_attn]),
            layout=QkvLayout(config.n_head, config.n_head, size),
            out=Projection([layer.attn.c_proj]),
            norm_2=Norm(layer.ln_2, backend),
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
        norm=Norm(trunk.ln_f, backend),
        scale=size**-0.5,
        backend=backend,
    )


# By ``model_type``. A reader returns ``None`` for a configuration that it does not support.
READERS: dict[str, Callable[[Any, str], Blocks | None]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "gpt2": _gpt2,
}


def read_blocks(trunk: Any, backend: str) -> Blocks | None:
    """Returns the blocks of ``trunk``, or ``None`` if the fast trunk does not support the model.

    Args:
        trunk: the model.
        backend: see ``Blocks``.
    """
    reader = READERS.get(trunk.config.model_type)
    return None if reader is None else reader(trunk, backend)
