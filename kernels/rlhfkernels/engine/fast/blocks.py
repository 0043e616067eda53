"""Blocks of the fast trunk: the weights that a layer is made of, and how it uses them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rlhfkernels.engine.fast.projections import GatheredProjection, Projection
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
