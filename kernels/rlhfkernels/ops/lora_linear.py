"""Linear layers that read the same input, each with its LoRA adapter (arXiv:2106.09685), as one op.

The base weights are adjacent in memory and take one matmul, and so do the adapters' A. The input is kept once for all
layers, and the backward recomputes x Aᵀ. Frozen weights get no gradient. An adapter of another dtype than the input
computes in its own dtype, as in PEFT, and is added in the wider of the two. No copy of the input in its dtype is kept.

Shapes: m = rows, k = inputs, n = outputs of all layers, r = rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from rlhfkernels.ops.matmul import LowRankTerm, matmul, runs_native


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoraPart:
    """Adapter of one of the layers.

    Attributes:
        down: A, [r, k].
        up: B, [n of this layer, r].
        start: first of this layer's outputs among the n.
        scaling: multiplies the low-rank term.
    """

    down: nn.Parameter
    up: nn.Parameter
    start: int
    scaling: float

    @property
    def columns(self) -> slice:
        """Outputs of this layer."""
        return slice(self.start, self.start + self.up.shape[0])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LinearGroup:
    """Layers of one ``lora_linear`` with one adapter set.

    Attributes:
        weight: [n, k], all layers' weights in adjacent rows; shares the storage of ``weights``.
        bias: [n], all layers' biases, or ``None``; shares the storage of ``biases``.
        weights: parameter of each layer, [n of the layer, k], or [k, n of the layer] if ``transposed``.
        biases: parameter of each layer, or empty.
        transposed: the parameters are stored as inputs by outputs (GPT-2's Conv1D).
        down: [Σ r, k], all adapters' A in adjacent rows, or ``None``; shares the storage of ``parts``.
        up: [Σ n, r], all adapters' B in adjacent rows, or ``None``; shares the storage of ``parts``.
        parts: the adapters, in the order of the rows of ``down`` and ``up``.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    weights: tuple[nn.Parameter, ...]
    biases: tuple[nn.Parameter, ...]
    transposed: bool
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    parts: tuple[LoraPart, ...] = ()

    def column_blocks(self, low: torch.Tensor) -> Iterator[tuple[slice, LowRankTerm | None]]:
        """Yields all outputs in order, in blocks with one low-rank term or none.

        Args:
            low: [m, Σ r], all adapters' x Aᵀ.
        """
        at = rank = 0
        for part in self.parts:
            if part.start > at:
                yield slice(at, part.start), None
            stop = rank + part.down.shape[0]
            yield part.columns, LowRankTerm(low[:, rank:stop], part.up.t(), part.scaling)
            at, rank = part.columns.stop, stop
        if at < self.weight.shape[0]:
            yield slice(at, self.weight.shape[0]), None

    @property
    def adapted(self) -> slice:
        """Outputs from the first adapted layer to the last."""
        return slice(self.parts[0].start, self.parts[-1].columns.stop)

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Returns all parameters: weights, biases, every A, every B."""
        return (*self.weights, *self.biases, *(p.down for p in self.parts), *(p.up for p in self.parts))


def lora_linear_reference(x: torch.Tensor, group: LinearGroup) -> torch.Tensor:
    """Computes every layer by itself, as PEFT does.

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


def lora_linear(
    x: torch.Tensor,
    group: LinearGroup,
    *,
    backend: str = "auto",
    reread: Callable[[], LinearGroup] | None = None,
) -> torch.Tensor:
    """Computes ``lora_linear_reference`` and its gradients.

    Args:
        x: as in ``lora_linear_reference``.
        group: as in ``lora_linear_reference``.
        backend: as in ``matmul``.
        reread: makes the group again for the backward, which may find the weights in other storages; ``None`` keeps
            the group.

    Returns:
        [..., n].
    """
    if torch.is_grad_enabled():
        parameters = group.parameters()
        if x.requires_grad or any(p.requires_grad for p in parameters):
            read = (lambda: group) if reread is None else reread
            y: torch.Tensor = _LoraLinear.apply(x, read, backend, *parameters)  # type: ignore[no-untyped-call]
            return y
    return _forward(x, group, backend)


def _forward(x: torch.Tensor, group: LinearGroup, backend: str) -> torch.Tensor:
    with torch.no_grad():
        rows = x.reshape(-1, x.shape[-1])
        # Allocated in its final shape: the op that follows may not change a view in place.
        result = x.new_empty(*x.shape[:-1], group.weight.shape[0])
        y = result.view(rows.shape[0], -1)
        low = None if group.down is None else _low_rank(rows, group.down, backend)
        if low is not None and runs_native(rows, group.weight.t(), y, low, backend=backend):
            for columns, term in group.column_blocks(low):
                matmul(rows, group.weight[columns].t(), out=y[:, columns], low_rank=term, backend=backend)
        else:
            matmul(rows, group.weight.t(), out=y, backend=backend)
            if low is not None:
                _add_low_ranks_(y, low, group)
        if group.bias is not None:
            y.add_(group.bias)
        return result


def _low_rank(x: torch.Tensor, down: torch.Tensor, backend: str) -> torch.Tensor:
    """Returns x Aᵀ, [m, Σ r], in the adapters' dtype."""
    return matmul(x.to(down.dtype), down.t(), backend=backend)


def _add_low_ranks_(y: torch.Tensor, low: torch.Tensor, group: LinearGroup) -> None:
    """Adds every adapter's scaled low Bᵀ to its columns of ``y``, [m, n]."""
    if _is_one_batch(group, y):
        ups = _batched(group)
        _by_part(y[:, group.adapted], ups).baddbmm_(
            _by_part(low, ups), ups.transpose(1, 2), alpha=group.parts[0].scaling
        )
        return
    for columns, term in group.column_blocks(low):
        if term is not None:
            _add_low_rank_(y[:, columns], term)


def _is_one_batch(group: LinearGroup, y: torch.Tensor) -> bool:
    """Returns whether the matmuls with all adapters' B are one batched matmul, in place of a launch for each.

    The adapters must be of one shape and scale and side by side, as those of gate and up are, and of queries, keys and
    values without grouped heads.
    """
    first = group.parts[0]
    if not _batches_pay(y) or len(group.parts) == 1 or group.up is None or group.up.dtype != y.dtype:
        return False
    width = first.up.shape[0]
    return all(
        part.up.shape == first.up.shape and part.scaling == first.scaling and part.start == first.start + i * width
        for i, part in enumerate(group.parts)
    )


def _batches_pay(y: torch.Tensor) -> bool:
    """Returns whether a batched matmul beats one call a part: not on the CPU, where it copies strided outputs."""
    return not y.is_cpu


def _batched(group: LinearGroup) -> torch.Tensor:
    """Views all adapters' B as [parts, n of a part, r]."""
    assert group.up is not None
    return group.up.view(len(group.parts), -1, group.up.shape[1])


def _by_part(x: torch.Tensor, ups: torch.Tensor) -> torch.Tensor:
    """Views [m, parts · k] as [parts, m, k], for as many parts as ``ups`` has."""
    return x.view(x.shape[0], ups.shape[0], -1).transpose(0, 1)


def _add_low_rank_(target: torch.Tensor, term: LowRankTerm) -> None:
    """Computes target += scale · left right, in the wider of their dtypes: a narrow adapter must not round W x."""
    dtype = torch.promote_types(target.dtype, term.left.dtype)
    left, right = term.left.to(dtype), term.right.to(dtype)
    if target.dtype == dtype:
        target.addmm_(left, right, alpha=term.scale)
    else:
        target.copy_(torch.addmm(target.to(dtype), left, right, alpha=term.scale))


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, read: Callable[[], LinearGroup], backend: str, *parameters: nn.Parameter
    ) -> torch.Tensor:
        # What reads the group keeps the weights alive; only the input must be saved.
        ctx.read, ctx.backend = read, backend
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None)
        return _forward(x, read(), backend)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        group: LinearGroup = ctx.read()
        (x,) = ctx.saved_tensors
        shape = grads[0].shape
        grad = grads[0].reshape(-1, shape[-1])
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        grad_x = grad.new_empty(grad.shape[0], group.weight.shape[1]) if ctx.needs_input_grad[0] else None
        if grad_x is not None and group.down is None:
            matmul(grad, group.weight, out=grad_x, backend=ctx.backend)
        bases = _base_gradients(group, grad, rows, ctx.needs_input_grad[3:])
        adapters: tuple[torch.Tensor | None, ...] = ()
        if group.down is not None:
            adapters = _adapter_gradients(
                group, grad, rows, grad_x, ctx.needs_input_grad[3 + len(bases) :], ctx.backend
            )
        return None if grad_x is None else grad_x.view(*shape[:-1], -1), None, None, *bases, *adapters


def _base_gradients(
    group: LinearGroup, grad: torch.Tensor, x: torch.Tensor | None, needed: tuple[bool, ...]
) -> tuple[torch.Tensor | None, ...]:
    """Returns the gradients of the layers' weights, then of their biases; ``None`` for frozen ones."""
    sizes = [weight.shape[1 if group.transposed else 0] for weight in group.weights]
    parts = torch.split(grad, sizes, dim=-1)
    gradients: list[torch.Tensor | None] = []
    for part, is_needed in zip(parts, needed, strict=False):
        if not is_needed:
            gradients.append(None)
        else:
            assert x is not None
            gradients.append(x.t() @ part if group.transposed else part.t() @ x)
    biases_needed = needed[len(parts) : len(parts) + len(group.biases)]
    gradients += [part.sum(0) if is_needed else None for part, is_needed in zip(parts, biases_needed, strict=False)]
    return tuple(gradients)


def _adapter_gradients(
    group: LinearGroup,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    grad_x: torch.Tensor | None,
    needed: tuple[bool, ...],
    backend: str,
) -> tuple[torch.Tensor | None, ...]:
    """Returns the gradients of every A, then of every B; writes ``grad_x``, of the base and the adapters."""
    assert group.down is not None
    dtype = group.down.dtype
    count = len(group.parts)
    low = None if x is None or not any(needed[count:]) else _low_rank(x, group.down, backend)
    grad_low = grad.new_empty(grad.shape[0], group.down.shape[0], dtype=dtype)
    ups: list[torch.Tensor | None] = []
    is_one_batch = _is_one_batch(group, grad)
    if is_one_batch:
        batch = _batched(group)
        torch.bmm(_by_part(grad[:, group.adapted], batch), batch, out=_by_part(grad_low, batch))
        grad_low.mul_(group.parts[0].scaling)
    start = 0
    for part, is_needed in zip(group.parts, needed[count:], strict=True):
        stop = start + part.down.shape[0]
        grad_part = grad[:, part.columns].to(dtype)
        if not is_one_batch:
            matmul(grad_part, part.up, out=grad_low[:, start:stop], scale=part.scaling, backend=backend)
        up = None
        if is_needed and low is not None:
            up = matmul(grad_part.t(), low[:, start:stop], scale=part.scaling, backend=backend)
        ups.append(up)
        start = stop
    if grad_x is not None:
        term = LowRankTerm(grad_low, group.down, 1.0)
        if runs_native(grad, group.weight, grad_x, grad_low, backend=backend):
            matmul(grad, group.weight, out=grad_x, low_rank=term, backend=backend)
        else:
            matmul(grad, group.weight, out=grad_x, backend=backend)
            _add_low_rank_(grad_x, term)
    downs: list[torch.Tensor | None] = [None] * count
    if x is not None and any(needed[:count]):
        gradient = matmul(grad_low.t(), x.to(dtype), backend=backend)
        pieces = torch.split(gradient, [part.down.shape[0] for part in group.parts])
        downs = [piece if is_needed else None for piece, is_needed in zip(pieces, needed[:count], strict=True)]
    return (*downs, *ups)
