"""Architectures of the fast trunk: the weights that a layer is made of, and how it uses them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import GELUActivation, NewGELUActivation, SiLUActivation

from rlhfkernels.engine.fast.projections import GatheredProjection, Projection
from rlhfkernels.models.configuration import LENGTH_DEPENDENT_ROTARY
from rlhfkernels.ops.qkv_layout import QkvLayout
from rlhfkernels.ops.rms_norm import rms_norm
from rlhfkernels.ops.rotary import make_signed_sin


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
        module: transformers' layer, whose hooks gather divided weights.
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
    module: nn.Module
    parallel: bool = False
    window: int | None = None

    @property
    def projections(self) -> tuple[Projection, Projection, Projection, Projection]:
        """``qkv``, ``out``, ``up`` and ``down``."""
        return self.qkv, self.out, self.up, self.down

    @property
    def is_gathered(self) -> bool:
        """True where the weights are divided among ranks, and whole only while the block runs."""
        return isinstance(self.qkv, GatheredProjection)

    def run(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Computes ``function(x)``, which reads the layer's weights, with these at hand."""
        if not self.is_gathered:
            return function(x)
        y: torch.Tensor = self.module(function, x)
        return y


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

    @property
    def are_gathered(self) -> bool:
        """See ``Block.is_gathered``."""
        return self.layers[0].is_gathered

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


def _llama(trunk: Any, backend: str, projection: type[Projection]) -> Blocks | None:
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
                qkv=projection([attention.q_proj, attention.k_proj, attention.v_proj]),
                layout=layout,
                out=projection([attention.o_proj]),
                norm_2=Norm(layer.post_attention_layernorm, backend),
                up=projection([mlp.gate_proj, mlp.up_proj]),
                activation=_activation(mlp.act_fn),
                gated=True,
                down=projection([mlp.down_proj]),
                module=layer,
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


def _gpt_neox(trunk: Any, backend: str, projection: type[Projection]) -> Blocks | None:
    config = trunk.config
    if trunk.rotary_emb.rope_type in LENGTH_DEPENDENT_ROTARY:
        return None
    size = config.hidden_size // config.num_attention_heads
    layers = [
        Block(
            norm_1=Norm(layer.input_layernorm, backend),
            qkv=projection([layer.attention.query_key_value]),
            layout=QkvLayout(config.num_attention_heads, config.num_attention_heads, size, interleaved=True),
            out=projection([layer.attention.dense]),
            norm_2=Norm(layer.post_attention_layernorm, backend),
            up=projection([layer.mlp.dense_h_to_4h]),
            activation=_activation(layer.mlp.act),
            gated=False,
            down=projection([layer.mlp.dense_4h_to_h]),
            module=layer,
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


def _opt(trunk: Any, backend: str, projection: type[Projection]) -> Blocks | None:
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
                qkv=projection([attention.q_proj, attention.k_proj, attention.v_proj]),
                layout=layout,
                out=projection([attention.out_proj]),
                norm_2=Norm(layer.final_layer_norm, backend),
                up=projection([layer.fc1]),
                activation=_activation(layer.activation_fn),
                gated=False,
                down=projection([layer.fc2]),
                module=layer,
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


def _gpt2(trunk: Any, backend: str, projection: type[Projection]) -> Blocks | None:
    config = trunk.config
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx or config.add_cross_attention:
        return None
    size = config.n_embd // config.n_head
    layers = [
        Block(
            norm_1=Norm(layer.ln_1, backend),
            qkv=projection([layer.attn.c_attn]),
            layout=QkvLayout(config.n_head, config.n_head, size),
            out=projection([layer.attn.c_proj]),
            norm_2=Norm(layer.ln_2, backend),
            up=projection([layer.mlp.c_fc]),
            activation=_activation(layer.mlp.act),
            gated=False,
            down=projection([layer.mlp.c_proj]),
            module=layer,
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
READERS: dict[str, Callable[[Any, str, type[Projection]], Blocks | None]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "gpt2": _gpt2,
}


def read_blocks(trunk: Any, backend: str, *, is_divided: bool = False) -> Blocks | None:
    """Returns the blocks of ``trunk``, or ``None`` if the fast trunk does not support the model.

    Args:
        trunk: the model.
        backend: see ``Blocks``.
        is_divided: ranks hold parts of the weights, which hooks of the layers gather. The layers then run what
            ``Block.run`` hands them, and nothing else.
    """
    reader = READERS.get(trunk.config.model_type)
    if reader is None:
        return None
    blocks = reader(trunk, backend, GatheredProjection if is_divided else Projection)
    if blocks is not None and is_divided:
        for block in blocks.layers:
            block.module.forward = _call
    return blocks


def _call(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return function(x)
