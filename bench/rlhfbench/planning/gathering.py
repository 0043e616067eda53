"""The weights of a base that ZeRO-3 divides: hooks gather those of a module to run it, and let them go after.

It stands in for DeepSpeed's hooks (zero/parameter_offload.py) on fake tensors: the same weights are whole at the same
moments, and nothing is sent. A plan then needs no DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

Tag = Callable[[str, Iterable[torch.Tensor]], None]


class DividedWeights:
    """The weights of one base on one of several ranks.

    Args:
        root: the base; its forward begins every pass.
        world_size: ranks.
        tag: is told which tensors are gathered.

    Attributes:
        parts: what the rank holds of each weight, flat.
    """

    def __init__(self, root: nn.Module, world_size: int, tag: Tag) -> None:
        self._world_size, self._tag = world_size, tag
        self._shapes = {weight: weight.shape for weight in root.parameters()}
        self.parts = {weight: weight.new_empty(-(-weight.numel() // world_size)) for weight in self._shapes}
        self._others: dict[nn.Module, dict[nn.Parameter, None]] = {}  # what a module reads of others' weights
        self._users: dict[nn.Parameter, set[object]] = {weight: set() for weight in self._shapes}
        self._in_backward: dict[nn.Module, set[nn.Parameter]] = {}  # with what was gathered to compute them again
        self._stack = [root]
        for weight in self._shapes:
            _let_go(weight)
        for module in root.modules():
            module._parameters = _Watched(module._parameters, self._found_apart)
            module.register_forward_pre_hook(self._before_forward)
            module.register_forward_hook(self._after_forward)

    def reads(self, module: nn.Module, weights: Iterable[nn.Parameter]) -> None:
        """Declares that the forward of ``module`` reads weights of other modules."""
        self._others.setdefault(module, {}).update(dict.fromkeys(weights))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gathers every weight inside the block, each in a buffer of its own."""
        for weight in self._shapes:
            self._gather([weight])
        with self.kept():
            yield

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keeps what is gathered inside the block until its end."""
        for users in self._users.values():
            users.add(self)
        yield
        for users in self._users.values():
            users.discard(self)
        self.release_all()

    def release_all(self) -> None:
        """Lets go of all weights."""
        for weight in self._shapes:
            self._users[weight].clear()
            _let_go(weight)

    def end_backward(self) -> None:
        """Lets go of the weights of modules whose inputs need no gradient: their backward has no end of its own."""
        for module in list(self._in_backward):
            self._release(module, backward=True)

    def _weights_of(self, module: nn.Module) -> list[nn.Parameter]:
        own = (weight for weight in dict.values(module._parameters) if weight is not None)
        return list(dict.fromkeys([*own, *self._others.get(module, ())]))

    def _before_forward(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        self._stack.append(module)
        self._fetch(module)
        if torch._C._current_graph_task_id() != -1 and self._in_backward:  # a checkpoint computes it again
            owner = next(reversed(self._in_backward))
            for weight in self._weights_of(module):
                if not weight.requires_grad:
                    self._in_backward[owner].add(weight)
                    self._users[weight].add(owner)
        remaining = [0]

        def ended() -> None:
            remaining[0] -= 1
            if not remaining[0]:
                self._release(module, backward=True)

        def watched(tensor: torch.Tensor) -> torch.Tensor:
            remaining[0] += tensor.requires_grad
            return _called_in_backward(tensor, ended)

        return _mapped(inputs, watched)  # type: ignore[no-any-return]

    def _after_forward(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        self._stack.pop()
        self._release(module, backward=False)
        return _mapped(output, lambda tensor: _called_in_backward(tensor, lambda: self._begin_backward(module)))

    def _begin_backward(self, module: nn.Module) -> None:
        self._in_backward.setdefault(module, set())
        self._fetch(module)

    def _fetch(self, module: nn.Module) -> None:
        weights = self._weights_of(module)
        self._gather([weight for weight in weights if not _is_whole(weight, self._shapes)])
        for weight in weights:
            self._users[weight].add(module)

    def _found_apart(self, weight: nn.Parameter) -> None:
        """Gathers a weight that the running module reads as an attribute of another, from now on with its own."""
        if len(self._stack) > 1 and not _is_whole(weight, self._shapes):
            self.reads(self._stack[-1], [weight])
            self._gather([weight])

    def _release(self, module: nn.Module, *, backward: bool) -> None:
        again = self._in_backward.pop(module, set()) if backward else set()
        for weight in {**dict.fromkeys(self._weights_of(module)), **dict.fromkeys(again)}:
            self._users[weight].discard(module)
            if not self._users[weight]:
                _let_go(weight)

    def _gather(self, weights: list[nn.Parameter]) -> None:
        """One weight stays in its buffer; several are copied out of a common one (zero/partition_parameters.py)."""
        flat = [self._buffer(weights)] if len(weights) > 1 and self._world_size > 1 else []
        for weight in weights:
            shape = self._shapes[weight]
            if self._world_size == 1:
                buffer = self.parts[weight]
            else:
                buffer = weight.new_empty(shape.numel()) if flat else self._buffer([weight])
            weight.data = buffer[: shape.numel()].view(shape)

    def _buffer(self, weights: list[nn.Parameter]) -> torch.Tensor:
        buffer = weights[0].new_empty(sum(self.parts[weight].numel() for weight in weights) * self._world_size)
        self._tag("gathered", [buffer])
        return buffer


class _Watched(dict[str, nn.Parameter | None]):
    """The weights of a module by name; ``read`` is called with one that is read."""

    def __init__(self, weights: Mapping[str, nn.Parameter | None], read: Callable[[nn.Parameter], None]) -> None:
        super().__init__(weights)
        self._read = read

    def __getitem__(self, name: str) -> nn.Parameter | None:
        weight = super().__getitem__(name)
        if weight is not None:
            self._read(weight)
        return weight


def _is_whole(weight: nn.Parameter, shapes: Mapping[nn.Parameter, torch.Size]) -> bool:
    return weight.shape == shapes[weight]


def _let_go(weight: nn.Parameter) -> None:
    weight.data = torch.empty(0, dtype=weight.dtype, device=weight.device)


def _mapped(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with ``function`` of the tensors in it, as zero/utils.py, ``apply_to_tensors_only``."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        for key in value:
            value[key] = _mapped(value[key], function)
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(each, function) for each in value)
    return value


class _CallInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, function: Callable[[], None]) -> torch.Tensor:
        ctx.function = function
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.function()
        return *gradients, None


def _called_in_backward(tensor: torch.Tensor, function: Callable[[], None]) -> torch.Tensor:
    """``tensor``, with ``function`` called when the backward comes to it."""
    result: torch.Tensor = _CallInBackward.apply(tensor, function)  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    """DeepSpeed's ``nn.functional.linear`` (zero/linear.py). It saves the input for frozen weights too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        if x.dim() == 2 and bias is not None:
            return torch.addmm(bias, x, weight.t())
        output = x.matmul(weight.t())
        if bias is not None:
            output += bias
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        x, weight, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        for_x = gradient.matmul(weight) if needs_x else None
        for_weight = for_bias = None
        if needs_weight:
            rows = gradient.reshape(-1, gradient.shape[-1])
            for_weight = rows.t().matmul(x.reshape(-1, x.shape[-1]))
        if bias is not None and needs_bias:
            for_bias = gradient.sum(list(range(gradient.dim() - 1)))
        return for_x, for_weight, for_bias


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    result: torch.Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


@contextmanager
def deepspeed_linear() -> Iterator[None]:
    """Replaces ``nn.functional.linear`` inside the block, as ZeRO-3 does for the whole process."""
    with mock.patch.object(nn.functional, "linear", _linear):
        yield
