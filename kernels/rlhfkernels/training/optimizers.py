"""Optimizers: float32 master weights for narrower dtypes, and states that exist from the start.

States are allocated at construction, so that the memory of the first step is that of every step. The arithmetic is
torch's fused kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from rlhfkernels.algorithms.common import AllSum
from rlhfkernels.parallel.gradient_norm import NORM_EPS, total_norm
from rlhfkernels.parallel.strategies import Share, local
from rlhfkernels.training.schedule import cosine_factor

# Gradients are cast to the master weights' dtype in chunks of this many bytes: a cast of all of them at once would
# add 4 bytes a weight to the peak.
_WIDEN_BYTES = 256 * 2**20


class Optimizer:
    """One parameter group: gradient clipping, schedule, master weights.

    Args:
        parameters: the trained weights.
        lr: the peak learning rate.
        warmup_steps: steps of linear warm-up.
        total_steps: the step at which the cosine reaches 0.
        max_grad_norm: the group's gradient norm is clipped to this before the update.
        all_ranks: the squared norm of a gradient, from that of what this rank holds of it; ``None`` holds it whole.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        lr: float,
        warmup_steps: int,
        total_steps: int,
        max_grad_norm: float,
        all_ranks: AllSum | None = None,
    ) -> None:
        # Of divided weights the rank's part alone is trained here.
        self.parameters = [parameter for parameter in parameters if local(parameter).numel()]
        self._absent = [parameter for parameter in parameters if not local(parameter).numel()]
        self._all_ranks = all_ranks
        dtypes = [torch.float32, *(parameter.dtype for parameter in parameters)]
        self._dtype = functools.reduce(torch.promote_types, dtypes)  # of the norm, the same on all ranks
        self.peak_lr, self.warmup_steps, self.total_steps = lr, warmup_steps, total_steps
        self.max_grad_norm = max_grad_norm
        self.num_steps = 0
        self.masters: list[torch.Tensor] = [
            held.float() if held.dtype.itemsize < 4 else held for held in self._held(range(len(self.parameters)))
        ]
        # A float32 weight is its own master; only copies are tensors of the optimizer.
        self._is_copy = [m.dtype != p.dtype for m, p in zip(self.masters, self.parameters, strict=True)]

    def _held(self, rows: Iterable[int]) -> list[torch.Tensor]:
        """The part of the weights that this rank holds, without a graph."""
        return [local(self.parameters[i].detach()) for i in rows]

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.peak_lr * cosine_factor(self.num_steps, self.warmup_steps, self.total_steps)

    def tensors(self) -> list[torch.Tensor]:
        """Tensors of the optimizer: master copies and moments."""
        return [master for master, is_copy in zip(self.masters, self._is_copy, strict=True) if is_copy]

    def share(self) -> Share:
        """See ``RoleOptimizer.share``."""
        held = self._held(range(len(self.parameters)))
        return Share(
            sum(part.numel() for part in held),
            sum(part.nbytes for part in held),
            sum(part.nbytes for part, is_copy in zip(held, self._is_copy, strict=True) if not is_copy),
            sum(tensor.nbytes for tensor in self.tensors()),
        )

    def step(self) -> torch.Tensor:
        """Clips the gradients, updates the weights, frees the gradients.

        Returns:
            The gradient norm before clipping, a scalar.
        """
        norm = self._norm()
        if self._all_ranks is not None:
            norm = self._all_ranks(norm.to(self._dtype).square()).sqrt()
        factor = (self.max_grad_norm / (norm + NORM_EPS)).clamp_(max=1.0)
        for rows in self._chunks():
            masters = [self.masters[i] for i in rows]
            weights = [self.parameters[i] for i in rows]
            with torch.no_grad():
                grads = [_widened(w.grad, m) for w, m in zip(weights, masters, strict=True)]
                torch._foreach_mul_(grads, factor)
                self._update(rows, masters, grads)
                copied = [i for i in rows if self._is_copy[i]]
                if copied:
                    torch._foreach_copy_(self._held(copied), [self.masters[i] for i in copied])
            for weight in weights:
                weight.grad = None
        for weight in self._absent:
            weight.grad = None  # empty, but a view of the storage of other gradients
        self.num_steps += 1
        return norm

    def _norm(self) -> torch.Tensor:
        """The norm of the gradients that this rank holds, on its device: 0 where it holds none."""
        grads = [local(p.grad) for p in self.parameters if p.grad is not None]
        if not grads:
            return torch.zeros((), device=next((p.device for p in (*self.parameters, *self._absent)), None))
        return total_norm(grads)

    def _update(self, rows: Sequence[int], masters: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
        raise NotImplementedError

    def _chunks(self) -> list[list[int]]:
        """Indices of the parameters with a gradient, in chunks of at most ``_WIDEN_BYTES`` of float32 gradients."""
        chunks: list[list[int]] = [[]]
        size = 0
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            num_bytes = self.masters[i].numel() * 4
            size += num_bytes
            if chunks[-1] and size > _WIDEN_BYTES:
                chunks.append([])
                size = num_bytes
            chunks[-1].append(i)
        return [chunk for chunk in chunks if chunk]


class AdamW(Optimizer):
    """AdamW (arXiv:1711.05101) with betas 0.9 and 0.999.

    Args:
        parameters: the trained weights.
        weight_decay: decoupled weight decay.
        eps: added to the root of the second moment; it matters under bfloat16.
        **schedule: the arguments of ``Optimizer``.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, weight_decay: float, eps: float, **schedule: Any) -> None:
        super().__init__(parameters, **schedule)
        self.weight_decay, self.eps = weight_decay, eps
        self.first = [torch.zeros_like(m) for m in self.masters]
        self.second = [torch.zeros_like(m) for m in self.masters]
        self.counts = [torch.zeros((), device=m.device) for m in self.masters]

    def tensors(self) -> list[torch.Tensor]:
        """Master copies, both moments and the step counts."""
        return [*super().tensors(), *self.first, *self.second, *self.counts]

    def _update(self, rows: Sequence[int], masters: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
        adamw(
            masters,
            grads,
            [self.first[i] for i in rows],
            [self.second[i] for i in rows],
            [],
            [self.counts[i] for i in rows],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=self.weight_decay,
            eps=self.eps,
            maximize=False,
        )


class SGD(Optimizer):
    """Stochastic gradient descent without momentum; weight decay is added to the gradient.

    Arguments as ``AdamW``; ``eps`` is unused.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, weight_decay: float, eps: float, **schedule: Any) -> None:
        del eps
        super().__init__(parameters, **schedule)
        self.weight_decay = weight_decay

    def _update(self, rows: Sequence[int], masters: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
        sgd(
            masters,
            grads,
            [None] * len(masters),
            foreach=True,
            weight_decay=self.weight_decay,
            momentum=0.0,
            lr=self.lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


def _widened(grad: torch.Tensor | None, master: torch.Tensor) -> torch.Tensor:
    assert grad is not None
    return local(grad).to(master.dtype)
