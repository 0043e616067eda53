"""ZeRO-3 on fake tensors: the memory of DeepSpeed's stage 3 without DeepSpeed and without the other ranks.

Gradients, buckets and the optimizer's step follow zero/stage3.py of DeepSpeed 0.19; ``gathering`` follows its hooks.
Flat buffers are a tensor for each weight here, so that one layer more adds what the layer before it added.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd import Variable

from rlhfbench.planning.gathering import DividedWeights, Tag
from rlhfkernels.parallel.strategies import BaseModule, RoleOptimizer, Schedule, Share, Strategy

T = TypeVar("T")
# zero/config.py, ``sub_group_size``: elements of a rank's part that the optimizer steps at a time.
SUB_GROUP = 1_000_000_000


class PlannedStage3(Strategy):
    """Stands in for ``rlhfkernels.parallel.deepspeed`` in stage 3.

    Args:
        arguments: as ``Strategy``.
        tag: is told which tensors are gathered.
        is_gloo: the ranks are CPUs: gloo copies what a reduce-scatter reads.
        more: as ``Strategy``.
    """

    def __init__(self, *arguments: Any, tag: Tag, is_gloo: bool, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.tag, self.is_gloo = tag, is_gloo

    def divide(self, bases: Mapping[str, BaseModule]) -> None:
        """See ``Strategy.divide``."""
        self._modules = dict(bases)
        self._bases: dict[str, _Base] = {}

    def declare_trained(self, roles: Mapping[str, Sequence[nn.Parameter]], passes: Mapping[str, Sequence[str]]) -> None:
        """See ``Strategy.declare_trained``."""
        for base, module in self._modules.items():
            held = {id(p) for p in module.parameters()}
            found = {role: list(ps) for role, ps in roles.items() if ps and id(ps[0]) in held}
            self._bases[base] = _Base(self, module, found)

    def read(self, base: str, function: Callable[[], T]) -> T:
        """See ``Strategy.read``."""
        result: T = self._modules[base](function)
        return result

    def generate(self, base: str, function: Callable[[], T]) -> T:
        """See ``Strategy.generate``."""
        if self.options.parallel.gather == "layer":
            return self.read(base, function)
        with self._bases[base].weights.kept():
            return self.read(base, function)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See ``Strategy.tensors``."""
        for base in self._bases.values():
            yield from (("base", part) for part in base.weights.parts.values())
            yield from base.buffers()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """See ``Strategy.whole``."""
        with ExitStack() as stack:
            for base in self._bases.values():
                stack.enter_context(base.weights.whole())
            yield

    def release(self, base: str) -> None:
        """See ``Strategy.release``."""
        del self._modules[base], self._bases[base]

    def train(self, key: str, base: str, function: Callable[[], torch.Tensor], *, is_last: bool) -> torch.Tensor:
        """See ``Strategy.train``."""
        return self.read(base, function)

    def optimizer(self, role: str, schedule: Schedule) -> RoleOptimizer:
        """See ``Strategy.optimizer``."""
        return next(base.optimizers[role] for base in self._bases.values() if role in base.optimizers)


class _Base:
    """One base: its weights, the gradients that its backwards reduce, and the optimizers of its roles."""

    def __init__(self, strategy: PlannedStage3, module: BaseModule, roles: Mapping[str, list[nn.Parameter]]) -> None:
        self.world, self._size = strategy.world, strategy.options.parallel.reduce_bucket_size
        self._is_gloo = strategy.is_gloo
        self.weights = DividedWeights(module, self.world.size, strategy.tag)
        layers = module.layers()
        in_layers = {id(weight) for layer in layers for weight in layer.parameters()}
        for layer in layers:
            self.weights.reads(layer, layer.parameters())
        self.weights.reads(module, (weight for weight in module.parameters() if id(weight) not in in_layers))
        self.roles = roles
        self._trained = [weight for weights in roles.values() for weight in weights]
        self._waiting: list[nn.Parameter] = []
        self._num_elements = self._num_ready = 0
        self._ends_backward = False
        self.gradient = {weight: torch.zeros_like(self.weights.parts[weight]) for weight in self._trained}
        has_moments = strategy.options.optimizer.name != "sgd"
        self.optimizers = {role: _RoleStep(self, weights, has_moments) for role, weights in roles.items()}
        if self._trained:
            self._bucket = self._trained[0].new_empty(self._size)
            for weight in self._trained:
                weight.register_post_accumulate_grad_hook(self._add)  # type: ignore[no-untyped-call]

    def buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(part, tensor) of what lives between steps beside weights and optimizer states."""
        yield from (("gradients", gradient) for gradient in self.gradient.values())
        if self._trained:
            yield "buckets", self._bucket

    @torch.no_grad()
    def _add(self, weight: torch.Tensor) -> None:
        """Copies a gradient into the bucket, which is reduced before where it has no room."""
        assert isinstance(weight, nn.Parameter)
        assert weight.grad is not None
        if not self._ends_backward:
            self._ends_backward = True
            Variable._execution_engine.queue_callback(self._end_backward)
        size = weight.grad.numel()
        if self._num_elements and self._num_elements + size > self._size:
            self._reduce()
        if self._num_elements + size <= self._size:
            place = self._bucket.narrow(0, self._num_elements, size).view_as(weight.grad)
            place.copy_(weight.grad)
            weight.grad.data = place
        self._waiting.append(weight)
        self._num_elements += size

    @torch.no_grad()
    def _reduce(self) -> None:
        """Reduces the bucket through a buffer of its size; a single gradient that divides evenly needs none.

        Gloo copies what it reads (ProcessGroupGloo.cpp, ``reduce_scatter_tensor_coalesced``).
        """
        weights, self._waiting, self._num_elements = self._waiting, [], 0
        sizes = [self.weights.parts[weight].numel() * self.world.size for weight in weights]
        is_own = len(weights) == 1 and weights[0].grad is not None and weights[0].grad.numel() == sizes[0]
        buffer = [] if is_own else [self._bucket.new_empty(size) for size in sizes]
        if self._is_gloo:
            copy = [self._bucket.new_empty(size) for size in sizes]
            del copy
        for weight in weights:
            weight.grad = None
        del buffer

    def _end_backward(self) -> None:
        self._ends_backward = False
        self._reduce()
        self.weights.end_backward()

    @torch.no_grad()
    def step(self) -> None:
        """Steps all roles, after the last of them has clipped its gradients."""
        self._num_ready += 1
        if self._num_ready < len(self.roles):
            return
        self._num_ready = 0
        self.weights.release_all()
        for weight in self._trained:
            self.gradient[weight].double().norm()
        for weights in self.roles.values():
            for group in self._sub_groups(weights):
                copies = [self.gradient[weight].clone() for weight in group]
                copies = [copy.float() for copy in copies]
                del copies
        for weight in self._trained:
            self.gradient[weight].copy_(torch.zeros_like(self.weights.parts[weight]))

    def _sub_groups(self, weights: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        group: list[nn.Parameter] = []
        size = 0
        for weight in weights:
            group.append(weight)
            size += self.weights.parts[weight].numel()
            if size >= SUB_GROUP:
                yield group
                group, size = [], 0
        if group:
            yield group


class _RoleStep:
    """The optimizer of a role: the rank's master weights and moments, and the clipping of its gradients."""

    def __init__(self, base: _Base, weights: Sequence[nn.Parameter], has_moments: bool) -> None:
        self._base, self._weights = base, weights
        num_held = 3 if has_moments else 1
        parts = [base.weights.parts[weight] for weight in weights]
        self._held = [torch.empty_like(part, dtype=torch.float32) for part in parts for _ in range(num_held)]

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """See ``RoleOptimizer.step``."""
        gradient = self._base.gradient
        grads = [gradient[weight].float() for weight in self._weights]
        norm = self._base.world.all_sum(functools.reduce(torch.add, (grad.square().sum() for grad in grads))).sqrt()
        for weight, grad in zip(self._weights, grads, strict=True):
            gradient[weight].copy_(grad * norm)
        del grads, grad  # in bfloat16 these are copies, and none is left when the base steps
        self._base.step()
        return norm

    def tensors(self) -> Iterator[torch.Tensor]:
        """See ``RoleOptimizer.tensors``."""
        yield from self._held

    def share(self) -> Share:
        """See ``RoleOptimizer.share``."""
        parts = [self._base.weights.parts[weight] for weight in self._weights]
        return Share(
            sum(part.numel() for part in parts),
            sum(part.nbytes for part in parts),
            0,
            sum(held.nbytes for held in self._held),
        )
