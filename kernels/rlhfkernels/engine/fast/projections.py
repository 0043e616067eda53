"""Projections: linear layers that read the same input.

Where a rank holds all weights, they become one matmul: the weights move into one storage, of which each module keeps
its slice as its parameter. Modules, adapters and optimizers work as before.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhfkernels.errors import CaseError
from rlhfkernels.ops.lora_linear import LinearGroup, LoraPart, lora_linear
from rlhfkernels.ops.skinny_linear import SkinnyLoraLinear


class Projection:
    """Linear layers that read the same input, as one matmul for the bases and one for all adapters' A.

    Args:
        layers: each plain or wrapped by PEFT; their outputs are concatenated.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = tuple(layers)
        bases = [_base(layer) for layer in layers]
        _fuse(bases, "weight")
        if getattr(bases[0], "bias", None) is not None:
            _fuse(bases, "bias")
        names = {name for layer in layers if isinstance(layer, LoraLayer) for name in layer.lora_A}
        for name in names:
            adapted = [layer for layer, _ in _adapted(layers, name)]
            _fuse([layer.lora_A[name] for layer in adapted], "weight")
            _fuse([layer.lora_B[name] for layer in adapted], "weight")
        self._groups = {name: _make_group(layers, name) for name in (None, *names)}

    def follow_weights(self) -> None:
        """Finds the weights again after a library has moved them. Weights side by side must have stayed so."""
        self._groups = {name: _make_group(self._layers, name) for name in self._groups}

    def under(self, adapter: str | None) -> LinearGroup:
        """Returns the layers with an adapter set, or bare."""
        return self._groups.get(adapter, self._groups[None])

    def forward(self, x: torch.Tensor, adapter: str | None, backend: str) -> torch.Tensor:
        """Computes [m, n] of [m, k] with ``adapter``; ``backend`` as in ``matmul``."""
        return lora_linear(x, self.under(adapter), backend=backend)

    def for_decode(self, adapter: str | None, rows: int, buffers: dict[int, torch.Tensor]) -> SkinnyLoraLinear:
        """Returns the layers with ``adapter`` for ``rows`` rows a call, without a graph."""
        return SkinnyLoraLinear(self.under(adapter), rows, buffers)


class GatheredProjection(Projection):
    """Linear layers whose weights are whole only while their block runs, each in a storage of its own.

    Each is a matmul of its own, and finds its weights when it runs and again in the backward. ``under`` and
    ``for_decode``, which outlive a call, have no meaning here.

    Args:
        layers: as in ``Projection``.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers, self._groups = tuple(layers), {}

    def forward(self, x: torch.Tensor, adapter: str | None, backend: str) -> torch.Tensor:
        """See ``Projection.forward``."""
        readers = [functools.partial(_make_group, (layer,), adapter) for layer in self._layers]
        outputs = [lora_linear(x, read(), backend=backend, reread=read) for read in readers]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _base(layer: nn.Module) -> Any:
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def _adapted(layers: Sequence[nn.Module], adapter: str | None) -> list[tuple[LoraLayer, int]]:
    """The layers that an adapter set adapts, each with its first output."""
    sizes = [_base(layer).weight.shape[1 if isinstance(_base(layer), Conv1D) else 0] for layer in layers]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    pairs = zip(layers, starts, strict=True)
    return [(layer, start) for layer, start in pairs if isinstance(layer, LoraLayer) and adapter in layer.lora_A]


def _make_group(layers: Sequence[nn.Module], adapter: str | None) -> LinearGroup:
    """Makes the group of layers with one adapter set, or of the bare layers."""
    bases, adapted = [_base(layer) for layer in layers], _adapted(layers, adapter)
    transposed, has_bias = isinstance(bases[0], Conv1D), getattr(bases[0], "bias", None) is not None
    weight = _side_by_side([base.weight for base in bases])
    return LinearGroup(
        weight=weight.t() if transposed else weight,
        bias=_side_by_side([base.bias for base in bases]) if has_bias else None,
        weights=tuple(base.weight for base in bases),
        biases=tuple(base.bias for base in bases) if has_bias else (),
        transposed=transposed,
        down=_side_by_side([layer.lora_A[adapter].weight for layer, _ in adapted]) if adapted else None,
        up=_side_by_side([layer.lora_B[adapter].weight for layer, _ in adapted]) if adapted else None,
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


def _fuse(modules: Sequence[Any], name: str) -> None:
    """Concatenates the parameter ``name`` of all modules in one storage, which each keeps a slice of."""
    parameters: list[nn.Parameter] = [getattr(module, name) for module in modules]
    if len(parameters) == 1:
        return
    with torch.no_grad():
        fused = torch.cat([p.detach() for p in parameters])
    start = 0
    for module, parameter in zip(modules, parameters, strict=True):
        end = start + parameter.shape[0]
        setattr(module, name, nn.Parameter(fused[start:end], requires_grad=parameter.requires_grad))
        start = end


def _side_by_side(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Views parameters that lie one after the other in one storage as their concatenation.

    Raises:
        CaseError: they do not, because a library has moved them apart.
    """
    first = parameters[0].detach()
    if len(parameters) == 1:
        return first
    end = first.storage_offset()
    for parameter in parameters:
        is_first_storage = parameter.untyped_storage()._cdata == first.untyped_storage()._cdata
        if not (is_first_storage and parameter.storage_offset() == end and parameter.is_contiguous()):
            problem = "the library that divides optimizer states moved the weights of one matmul apart"
            raise CaseError([f"engine.trunk is 'fast': {problem}, so it must be plain."])
        end += parameter.numel()
    return first.as_strided((sum(len(parameter) for parameter in parameters), *first.shape[1:]), first.stride())
