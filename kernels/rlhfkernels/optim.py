"""The optimizers of a step: float32 master weights under lower precision, states made at once, a warm-up cosine.

States exist from the start, so that what a step needs is there before the first one and is counted. The arithmetic is
torch's own fused kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

# Gradients are widened for the master weights this many bytes at a time, not all at once.
_WIDEN_BYTES = 256 * 2**20


class Optimizer:
    """One parameter group: clipping, the schedule, master weights.

    Args:
        parameters: what it trains.
        lr: the peak learning rate.
        warmup_steps: steps of linear warm-up.
        total_steps: the step at which the cosine has reached 0.
        max_grad_norm: the group's gradient norm is clipped to this first.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        lr: float,
        warmup_steps: int,
        total_steps: int,
        max_grad_norm: float,
    ) -> None:
        self.parameters = list(parameters)
        self.peak_lr, self.warmup_steps, self.total_steps = lr, warmup_steps, total_steps
        self.max_grad_norm = max_grad_norm
        self.num_steps = 0
        self.masters: list[torch.Tensor] = [
            p.detach().float() if p.dtype.itemsize < 4 else p.detach() for p in self.parameters
        ]
        # A master that is the weight itself costs nothing; only a real copy is a tensor of the optimizer's.
        self._has_copies = any(m.dtype != p.dtype for m, p in zip(self.masters, self.parameters, strict=True))

    @property
    def lr(self) -> float:
        """The learning rate of the coming step."""
        return self.peak_lr * cosine_factor(self.num_steps, self.warmup_steps, self.total_steps)

    def tensors(self) -> list[torch.Tensor]:
        """Master copies and moments: everything that the optimizer holds beside the weights."""
        return self.masters if self._has_copies else []

    def step(self) -> torch.Tensor:
        """Clips, updates, drops the gradients; returns the gradient norm before clipping, a scalar."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        for rows in self._chunks():
            masters = [self.masters[i] for i in rows]
            weights = [self.parameters[i] for i in rows]
            with torch.no_grad():
                self._update(rows, masters, [_widened(w.grad, m) for w, m in zip(weights, masters, strict=True)])
                if self._has_copies:
                    torch._foreach_copy_([w.detach() for w in weights], masters)
            for weight in weights:
                weight.grad = None
        self.num_steps += 1
        return norm

    def _update(self, rows: Sequence[int], masters: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
        raise NotImplementedError

    def _chunks(self) -> list[list[int]]:
        """Indices of the parameters that have a gradient, in runs whose widened gradients stay small."""
        chunks: list[list[int]] = [[]]
        size = 0
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            size += parameter.numel() * 4
            if chunks[-1] and size > _WIDEN_BYTES:
                chunks.append([])
                size = parameter.numel() * 4
            chunks[-1].append(i)
        return [chunk for chunk in chunks if chunk]


class AdamW(Optimizer):
    """AdamW (arXiv:1711.05101), betas 0.9 and 0.999; further arguments as ``Optimizer``.

    Args:
        parameters: what it trains.
        weight_decay: decoupled.
        eps: added to the root of the second moment; matters under bfloat16.
        **schedule: the arguments of ``Optimizer``.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, weight_decay: float, eps: float, **schedule: float
    ) -> None:
        super().__init__(parameters, **schedule)  # type: ignore[arg-type]
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
    """Plain gradient descent with decoupled-free weight decay; no moments. Arguments as ``AdamW``, ``eps`` unused."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, weight_decay: float, eps: float, **schedule: float
    ) -> None:
        del eps
        super().__init__(parameters, **schedule)  # type: ignore[arg-type]
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


OPTIMIZERS: dict[str, type[AdamW] | type[SGD]] = {"adamw": AdamW, "sgd": SGD}


def cosine_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up to 1 over ``warmup_steps``, then half a cosine to 0 at ``total_steps``."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _widened(grad: torch.Tensor | None, master: torch.Tensor) -> torch.Tensor:
    assert grad is not None
    return grad.to(master.dtype)
