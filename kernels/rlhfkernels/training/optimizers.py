"""Optimizers: float32 master weights for narrower dtypes, eager states, linear warm-up and cosine decay.

States are allocated at construction, so that the memory of the first step is that of every step. The arithmetic is
torch's fused kernel, or bitsandbytes'.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from rlhfkernels.algorithms.common import AllSum
from rlhfkernels.config.options import OPTION_PACKAGES, OptimizerOptions
from rlhfkernels.errors import CaseError
from rlhfkernels.parallel.strategies import local

# Gradients are cast to the master weights' dtype in chunks of this many bytes: a cast of all of them at once would
# add 4 bytes a weight to the peak.
_WIDEN_BYTES = 256 * 2**20
# As in torch's clipping: what is added to the norm that divides.
_NORM_EPS = 1e-6

# bitsandbytes' 8-bit states (since 0.45, bitsandbytes/optim/optimizer.py, Optimizer2State.init_state): elements per
# scale, the smallest tensor with 8-bit states, entries of the quantisation map.
_BLOCK, _MIN_8BIT_ELEMENTS, _CODES = 256, 4096, 256


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
        """What this rank holds of the weights, without a graph."""
        return [local(self.parameters[i].detach()) for i in rows]

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.peak_lr * cosine_factor(self.num_steps, self.warmup_steps, self.total_steps)

    def tensors(self) -> list[torch.Tensor]:
        """Tensors of the optimizer: master copies and moments."""
        return [master for master, is_copy in zip(self.masters, self._is_copy, strict=True) if is_copy]

    def step(self) -> torch.Tensor:
        """Clips the gradients, updates the weights, frees the gradients.

        Returns:
            The gradient norm before clipping, a scalar.
        """
        norm = _total_norm([local(p.grad) for p in self.parameters if p.grad is not None])
        if self._all_ranks is not None:
            norm = self._all_ranks(norm.to(self._dtype).square()).sqrt()
        factor = (self.max_grad_norm / (norm + _NORM_EPS)).clamp_(max=1.0)
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


class AdamW8bitStates(Optimizer):
    """The states of 8-bit AdamW by bitsandbytes' rules, without its arithmetic: an update changes nothing.

    Both moments of a tensor of at least 4096 elements take one byte an element, and one float32 scale for each block of
    256 elements. Smaller tensors have float32 moments. All tensors share the two quantisation maps. A plan uses this
    class, so that it needs no bitsandbytes. Arguments as ``AdamW``.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, weight_decay: float, eps: float, **schedule: Any) -> None:
        super().__init__(parameters, **schedule)
        self.weight_decay, self.eps = weight_decay, eps
        self.maps = self._make_maps()
        self.states = [self._make_state(master) for master in self.masters]

    def tensors(self) -> list[torch.Tensor]:
        """Master copies, both moments, their scales and the quantisation maps."""
        held = [tensor for state in self.states for tensor in state.values()]
        return [*super().tensors(), *dict.fromkeys(held)]

    def _make_maps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The maps of the first and of the second moment, [256] each."""
        device = self.masters[0].device if self.masters else None
        return torch.zeros(_CODES, device=device), torch.zeros(_CODES, device=device)

    def _make_state(self, master: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of one tensor, under bitsandbytes' names."""
        if master.numel() < _MIN_8BIT_ELEMENTS:
            return {name: torch.zeros_like(master) for name in ("state1", "state2")}
        num_blocks = -(-master.numel() // _BLOCK)
        state = {name: torch.zeros_like(master, dtype=torch.uint8) for name in ("state1", "state2")}
        state |= {name: torch.zeros(num_blocks, device=master.device) for name in ("absmax1", "absmax2")}
        return {**state, "qmap1": self.maps[0], "qmap2": self.maps[1]}

    def _update(self, rows: Sequence[int], masters: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
        pass


class AdamW8bit(AdamW8bitStates):
    """AdamW with 8-bit states (arXiv:2110.02861), computed by bitsandbytes.

    The states are allocated at construction and handed to the library, which would allocate them at its first step.
    Arguments as ``AdamW``.

    Raises:
        CaseError: bitsandbytes is not installed.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, weight_decay: float, eps: float, **schedule: Any) -> None:
        self._package = _package_of("adamw8bit")
        super().__init__(parameters, weight_decay=weight_decay, eps=eps, **schedule)
        for master, state in zip(self.masters, self.states, strict=True):
            self._library.state[master] = {"step": 0, **state}

    def _make_maps(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._library = self._package.optim.AdamW8bit(
            self.masters, lr=self.peak_lr, betas=(0.9, 0.999), eps=self.eps, weight_decay=self.weight_decay
        )
        self._library.fill_qmap()
        first, second = (self._library.name2qmap[name] for name in ("dynamic", "udynamic"))
        return first.to(self.masters[0].device), second.to(self.masters[0].device)

    def _update(self, rows: Sequence[int], masters: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
        self._library.param_groups[0]["lr"] = self.lr
        for master, grad in zip(masters, grads, strict=True):
            master.grad = grad
        self._library.step()  # skips tensors without a gradient
        for master in masters:
            master.grad = None


def _package_of(optimizer: str) -> Any:
    """The package that implements ``optimizer``.

    Raises:
        CaseError: it is not installed.
    """
    package = OPTION_PACKAGES["optimizer.name"][optimizer]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise CaseError([f"optimizer.name is {optimizer!r}: it needs {package}, which is not installed."]) from error


OptimizerClass = type[AdamW] | type[SGD] | type[AdamW8bitStates]
OPTIMIZERS: dict[str, OptimizerClass] = {"adamw": AdamW, "sgd": SGD, "adamw8bit": AdamW8bit}
# For plans: the same memory without an optional package.
STAND_INS: dict[str, OptimizerClass] = {**OPTIMIZERS, "adamw8bit": AdamW8bitStates}


def make_optimizer(
    options: OptimizerOptions,
    parameters: Sequence[nn.Parameter],
    *,
    learning_rate: float | None = None,
    computes: bool = True,
    all_ranks: AllSum | None = None,
) -> Optimizer:
    """Makes the optimizer that ``options`` name.

    Args:
        options: of the case.
        parameters: the trained weights.
        learning_rate: peak learning rate; ``None`` is that of the options.
        computes: ``False`` for a plan: the memory alone counts, and no optional package is needed.
        all_ranks: see ``Optimizer``.

    Raises:
        CaseError: an optional package is not installed.
    """
    return (OPTIMIZERS if computes else STAND_INS)[options.name](
        parameters,
        lr=options.learning_rate if learning_rate is None else learning_rate,
        warmup_steps=options.warmup_steps,
        total_steps=options.max_steps,
        max_grad_norm=options.max_grad_norm,
        all_ranks=all_ranks,
        weight_decay=options.weight_decay,
        eps=options.adam_epsilon,
    )


def learning_rate(options: OptimizerOptions, peak: float | None, step: int) -> float:
    """The learning rate of a step, from 0; ``peak`` is that of the options where it is ``None``."""
    highest = options.learning_rate if peak is None else peak
    return highest * cosine_factor(step, options.warmup_steps, options.max_steps)


def cosine_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up to 1 over ``warmup_steps``, then half a cosine to 0 at ``total_steps``."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _total_norm(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the norm of all gradients, a scalar in float32 or wider.

    In bfloat16 it would have 3 digits, and clipping multiplies every gradient by it.
    """
    norms: list[torch.Tensor] = []
    for dtype in dict.fromkeys(grad.dtype for grad in grads):  # torch's fused norm takes one
        alike = [grad for grad in grads if grad.dtype == dtype]
        norms += torch._foreach_norm(alike, 2.0, torch.promote_types(dtype, torch.float32))
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def _widened(grad: torch.Tensor | None, master: torch.Tensor) -> torch.Tensor:
    assert grad is not None
    return local(grad).to(master.dtype)
