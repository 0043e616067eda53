"""Readers of transformers' architectures: each finds the blocks of the fast trunk in a model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import GELUActivation, NewGELUActivation, SiLUActivation

from rlhfkernels.engine.fast.blocks import Block, Blocks, Norm
from rlhfkernels.engine.fast.projections import GatheredProjection, Projection
from rlhfkernels.models.configuration import LENGTH_DEPENDENT_ROTARY
from rlhfkernels.ops.qkv_layout import QkvLayout

gelu_tanh = functools.partial(nn.functional.gelu, approximate="tanh")


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _llama(trunk: Any, backend: str, projection: type[Projection], *, window_in_config: bool = False) -> Blocks | None:
    """Reads Llama's layout. A layer has its own attention window (Qwen2), or all have the configuration's (Mistral)."""
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
                window=getattr(config if window_in_config else attention, "sliding_window", None),
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
    "mistral": functools.partial(_llama, window_in_config=True),
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
