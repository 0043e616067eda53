"""Several linear layers that read the same input, each with its low-rank adapter (arXiv:2106.09685), as one op.

The base weights lie in adjacent rows and are one product; so are the adapters' A. The input is kept once for all of
them, and the low-rank projection is recomputed in the backward. Frozen weights get no gradient. An adapter in a wider
dtype than the input works in its own, as PEFT does, but no wide copy of the input is kept.

Shapes: m = rows, k = inputs, n = outputs of all layers, r = rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rlhfkernels.ops.product import Pair, product, runs_in_c


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoraPart:
    """The adapter of one of the layers.

    Attributes:
        down: A, [r, k].
        up: B, [n of this layer, r].
        start: where this layer's outputs begin among the n.
        scaling: multiplier of the low-rank product.
    """

    down: nn.Parameter
    up: nn.Parameter
    start: int
    scaling: float

    @property
    def columns(self) -> slice:
        """This layer's outputs."""
        return slice(self.start, self.start + self.up.shape[0])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LinearGroup:
    """The layers of one ``lora_linear`` under one adapter set.

    Attributes:
        weight: [n, k], all layers' weights in adjacent rows; its storage is that of ``weights``.
        bias: [n], likewise, or ``None``.
        weights: each layer's parameter, [n of the layer, k], or [k, n of the layer] where ``transposed``.
        biases: each layer's parameter, or none at all.
        transposed: the parameters are stored as inputs by outputs (GPT-2's Conv1D).
        down: [Σ r, k], all adapters' A in adjacent rows, its storage that of the parts'; ``None`` without adapters.
        up: [Σ n, r], all adapters' B in adjacent rows, likewise.
        parts: the adapters, in the order of the rows of both.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    weights: tuple[nn.Parameter, ...]
    biases: tuple[nn.Parameter, ...]
    transposed: bool
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    parts: tuple[LoraPart, ...] = ()

    def pieces(self, low: torch.Tensor) -> Iterator[tuple[slice, Pair | None]]:
        """All outputs in order: those of a layer with an adapter, with its low-rank part; and those in between.

        Args:
            low: [m, Σ r], all adapters' x Aᵀ.
        """
        at = rank = 0
        for part in self.parts:
            if part.start > at:
                yield slice(at, part.start), None
            stop = rank + part.down.shape[0]
            yield part.columns, Pair(low[:, rank:stop], part.up.t(), part.scaling)
            at, rank = part.columns.stop, stop
        if at < self.weight.shape[0]:
            yield slice(at, self.weight.shape[0]), None

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Everything that may be trained: weights, biases, every A, every B."""
        return (*self.weights, *self.biases, *(p.down for p in self.parts), *(p.up for p in self.parts))


def lora_linear_reference(x: torch.Tensor, group: LinearGroup) -> torch.Tensor:
    """The plain form: every layer by itself, as PEFT runs it.

    Args:
        x: [..., k].
        group: the layers.

    Returns:
        [..., n].
    """
    outputs: list[torch.Tensor] = []
    start = 0
    for i, weight in enumerate(group.weights):
        matrix = weight.t() if group.transposed else weight
        y = nn.functional.linear(x, matrix, group.biases[i] if group.biases else None)
        for part in group.parts:
            if part.start == start:
                low = nn.functional.linear(x.to(part.down.dtype), part.down)
                y = (y + nn.functional.linear(low, part.up) * part.scaling).to(x.dtype)
        outputs.append(y)
        start += matrix.shape[0]
    return torch.cat(outputs, dim=-1)


def lora_linear(x: torch.Tensor, group: LinearGroup, *, kernels: str = "auto") -> torch.Tensor:
    """The fast form of ``lora_linear_reference``, with the same gradients; ``kernels`` as ``product`` takes it."""
    if torch.is_grad_enabled():
        parameters = group.parameters()
        if x.requires_grad or any(p.requires_grad for p in parameters):
            y: torch.Tensor = _LoraLinear.apply(x, group, kernels, *parameters)  # type: ignore[no-untyped-call]
            return y
    return _forward(x, group, kernels)


def _forward(x: torch.Tensor, group: LinearGroup, kernels: str) -> torch.Tensor:
    with torch.no_grad():
        rows = x.reshape(-1, x.shape[-1])
        # Made in its last shape: a view of something else could not be changed in place by the op that comes next.
        whole = x.new_empty(*x.shape[:-1], group.weight.shape[0])
        y = whole.view(rows.shape[0], -1)
        low = None if group.down is None else _low_rank(rows, group.down, kernels)
        if low is not None and runs_in_c(rows, group.weight.t(), y, low, kernels=kernels):
            for columns, pair in group.pieces(low):
                product(rows, group.weight[columns].t(), out=y[:, columns], also=pair, kernels=kernels)
        else:
            product(rows, group.weight.t(), out=y, kernels=kernels)
            for columns, pair in group.pieces(low) if low is not None else ():
                if pair is not None:
                    _add_product_(y[:, columns], pair)
        if group.bias is not None:
            y.add_(group.bias)
        return whole


def _low_rank(x: torch.Tensor, down: torch.Tensor, kernels: str) -> torch.Tensor:
    """x Aᵀ, [m, Σ r], in the adapters' dtype."""
    return product(x.to(down.dtype), down.t(), kernels=kernels)


def _add_product_(target: torch.Tensor, pair: Pair) -> None:
    """target += scale · left right, in the wider of the dtypes."""
    if target.dtype == pair.left.dtype:
        target.addmm_(pair.left, pair.right, alpha=pair.scale)
    else:
        target.copy_(torch.addmm(target.to(pair.left.dtype), pair.left, pair.right, alpha=pair.scale))


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: LinearGroup, kernels: str, *parameters: nn.Parameter) -> torch.Tensor:
        # The weights are kept by the group: only the input is something that would not live anyway.
        ctx.group, ctx.kernels = group, kernels
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None)
        return _forward(x, group, kernels)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        group: LinearGroup = ctx.group
        (x,) = ctx.saved_tensors
        shape = grads[0].shape
        grad = grads[0].reshape(-1, shape[-1])
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        grad_x = grad.new_empty(grad.shape[0], group.weight.shape[1]) if ctx.needs_input_grad[0] else None
        if grad_x is not None and group.down is None:
            product(grad, group.weight, out=grad_x, kernels=ctx.kernels)
        bases = _base_gradients(group, grad, rows, ctx.needs_input_grad[3:])
        adapters: tuple[torch.Tensor | None, ...] = ()
        if group.down is not None:
            adapters = _adapter_gradients(
                group, grad, rows, grad_x, ctx.needs_input_grad[3 + len(bases) :], ctx.kernels
            )
        return None if grad_x is None else grad_x.view(*shape[:-1], -1), None, None, *bases, *adapters


def _base_gradients(
    group: LinearGroup, grad: torch.Tensor, x: torch.Tensor | None, needed: tuple[bool, ...]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the layers' weights, then of their biases; ``None`` where frozen."""
    sizes = [weight.shape[1 if group.transposed else 0] for weight in group.weights]
    parts = torch.split(grad, sizes, dim=-1)
    found: list[torch.Tensor | None] = []
    for part, wanted in zip(parts, needed, strict=False):
        if not wanted:
            found.append(None)
        else:
            assert x is not None
            found.append(x.t() @ part if group.transposed else part.t() @ x)
    wants_bias = needed[len(parts) : len(parts) + len(group.biases)]
    found += [part.sum(0) if wanted else None for part, wanted in zip(parts, wants_bias, strict=False)]
    return tuple(found)


def _adapter_gradients(
    group: LinearGroup,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    grad_x: torch.Tensor | None,
    needed: tuple[bool, ...],
    kernels: str,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of every A, then of every B; fills in ``grad_x``, the base's share and the adapters'."""
    assert group.down is not None
    wide = group.down.dtype
    count = len(group.parts)
    low = None if x is None or not any(needed[count:]) else _low_rank(x, group.down, kernels)
    grad_low = grad.new_empty(grad.shape[0], group.down.shape[0], dtype=wide)
    ups: list[torch.Tensor | None] = []
    start = 0
    for part, wanted in zip(group.parts, needed[count:], strict=True):
        stop = start + part.down.shape[0]
        wider = grad[:, part.columns].to(wide)
        product(wider, part.up, out=grad_low[:, start:stop], scale=part.scaling, kernels=kernels)
        up = None
        if wanted and low is not None:
            up = product(wider.t(), low[:, start:stop], scale=part.scaling, kernels=kernels)
        ups.append(up)
        start = stop
    if grad_x is not None:
        pair = Pair(grad_low, group.down, 1.0)
        if runs_in_c(grad, group.weight, grad_x, grad_low, kernels=kernels):
            product(grad, group.weight, out=grad_x, also=pair, kernels=kernels)
        else:
            product(grad, group.weight, out=grad_x, kernels=kernels)
            _add_product_(grad_x, pair)
    downs: list[torch.Tensor | None] = [None] * count
    if x is not None and any(needed[:count]):
        whole = product(grad_low.t(), x.to(wide), kernels=kernels)
        pieces = torch.split(whole, [part.down.shape[0] for part in group.parts])
        downs = [piece if wanted else None for piece, wanted in zip(pieces, needed[:count], strict=True)]
    return (*downs, *ups)
