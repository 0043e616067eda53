"""Ways in which ranks share the weights of a step: not at all, or as torch and DeepSpeed do it.

The unit is a ``BaseModule``: a trunk, the heads that read it, and their adapters. Its forward calls a function, so that
the hooks of torch and DeepSpeed, which gather weights before a forward and reduce gradients in a backward, see every
forward pass of the engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhfkernels.config.options import Options
from rlhfkernels.errors import CaseError
from rlhfkernels.observer import Observer
from rlhfkernels.parallel.world import World

T = TypeVar("T")
# The learning rate of a step, from 0.
Schedule = Callable[[int], float]


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """The part of a role's weights that an optimizer updates on this rank.

    Attributes:
        count: elements.
        num_bytes: bytes of these elements in the dtype of the weights.
        read_bytes: bytes of those without a master copy; the others are written alone.
        held_bytes: bytes of their master copies and states once the optimizer has stepped.
    """

    count: int
    num_bytes: int
    read_bytes: int
    held_bytes: int


class RoleOptimizer(Protocol):
    """The optimizer of one role's weights."""

    def step(self) -> torch.Tensor:
        """Clips the gradients, updates the weights, frees the gradients.

        Returns:
            The gradient norm before clipping, a scalar.
        """
        ...

    def tensors(self) -> Iterable[torch.Tensor]:
        """Master copies and moments."""
        ...

    def share(self) -> Share:
        """The part of the weights that it updates, the same before the first step as after."""
        ...


class BaseModule(nn.Module):
    """One base with everything that reads it.

    Args:
        trunk: with its adapters.
        heads: the language-model head and the scalar heads that read the trunk; a tied head stays tied.
    """

    def __init__(self, trunk: nn.Module, heads: Iterable[nn.Module]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(heads)

    def forward(self, function: Callable[[], T]) -> T:
        """Calls ``function``, which reads the base's weights."""
        return function()

    def layers(self) -> list[nn.Module]:
        """Transformers' layers, each of which is gathered at one time where weights are divided."""
        return [module for module in self.trunk.modules() if isinstance(module, GradientCheckpointingLayer)]


class Strategy:
    """One process with all weights.

    Args:
        options: of the case.
        world: the ranks.
        device: of this rank.
        may_skip: a backward may leave trained weights out: a router may send no token of a rank to an expert.

    Attributes:
        observer: of the step that runs.
    """

    def __init__(self, options: Options, world: World, device: torch.device, *, may_skip: bool = False) -> None:
        self.options, self.world, self.device, self.may_skip = options, world, device, may_skip
        self.observer = Observer()

    def divide(self, bases: Mapping[str, BaseModule]) -> None:
        """Divides the weights of all bases among the ranks; before any of them is declared trained."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(part, tensor) of what lives between steps beside weights and optimizer states."""
        yield from ()

    def release(self, base: str) -> None:
        """Lets go of a base that nothing reads any more."""

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gathers every weight on every rank inside the block."""
        yield

    def declare_trained(self, roles: Mapping[str, Sequence[nn.Parameter]], passes: Mapping[str, Sequence[str]]) -> None:
        """Declares what is trained, before the first pass.

        Args:
            roles: the trained weights that each role owns.
            passes: the roles whose weights each differentiated pass trains; the keys are those of ``train``.
        """

    def read(self, base: str, function: Callable[[], T]) -> T:
        """Calls ``function``, which reads the weights of ``base`` without a graph."""
        return function()

    def generate(self, base: str, function: Callable[[], T]) -> T:
        """Calls ``function``, which generates with ``base``."""
        return function()

    def train(self, key: str, base: str, function: Callable[[], torch.Tensor], *, is_last: bool) -> torch.Tensor:
        """Calls ``function``, whose result a backward follows, which adds up the gradients of all ranks.

        Args:
            key: of the pass; see ``declare_trained``.
            base: that it reads.
            function: returns a scalar with a graph.
            is_last: no other backward of the pass follows before the optimizer's step. Gradients may wait for it.
        """
        return function()

    def all_ended(self, ended: bool) -> bool:
        """True where every rank that must go on together has ``ended``."""
        return ended

    def optimizer(self, role: str, schedule: Schedule) -> RoleOptimizer | None:
        """The optimizer of a role where the library that divides the weights has its own; ``None`` elsewhere.

        Args:
            role: it owns trained weights.
            schedule: the learning rate of a step.
        """
        return None

    @property
    def squared_norm(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Takes the squared norm of what this rank holds of a gradient to that of all; ``None`` where it holds all."""
        return None


class DataParallel(Strategy):
    """Every rank holds all weights; torch's ``DistributedDataParallel`` averages the gradients."""

    def declare_trained(self, roles: Mapping[str, Sequence[nn.Parameter]], passes: Mapping[str, Sequence[str]]) -> None:
        """See ``Strategy.declare_trained``."""
        from torch.nn.parallel import DistributedDataParallel  # it imports the compiler

        self._buckets: dict[tuple[str, int], torch.Tensor] = {}
        self._modules = {
            key: DistributedDataParallel(
                TrainedWeights([weight for role in found for weight in roles.get(role, ())]),
                find_unused_parameters=self.may_skip,
                # The gradients live in the buckets: as views they take no memory of their own.
                gradient_as_bucket_view=True,
            )
            for key, found in passes.items()
        }
        for key, module in self._modules.items():
            # A lambda: torch compares annotations with its class, and here they are texts.
            module.register_comm_hook(key, lambda key, bucket: self._average(key, bucket))

    def _average(self, key: str, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        """Averages a bucket as the module itself would, and remembers it: it lives between steps, gradients or not."""
        from torch.distributed import group
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        assert group.WORLD is not None, "the rank has joined its world"
        self._buckets[key, bucket.index()] = bucket.buffer()
        found: torch.futures.Future[torch.Tensor] = allreduce_hook(group.WORLD, bucket)
        return found

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See ``Strategy.tensors``: the buckets, which are the gradients."""
        yield from (("gradients", bucket) for bucket in self._buckets.values())

    def train(self, key: str, base: str, function: Callable[[], torch.Tensor], *, is_last: bool) -> torch.Tensor:
        """See ``Strategy.train``."""
        module = self._modules[key]
        if is_last:
            return module(function)  # type: ignore[no-any-return]
        with module.no_sync():
            return module(function)  # type: ignore[no-any-return]


class TrainedWeights(nn.Module):
    """Weights that are trained; the forward calls a function that reads them."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(parameters)

    def forward(self, function: Callable[[], T]) -> T:
        """Calls ``function``, which reads the weights."""
        return function()


class FullyShard(Strategy):
    """Weights, gradients and optimizer states are divided by torch's ``fully_shard``, layer by layer.

    A rank gathers a layer to run it and frees it after. Embeddings, last norm and heads stay gathered from a forward to
    its backward.
    """

    def divide(self, bases: Mapping[str, BaseModule]) -> None:
        """See ``Strategy.divide``."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        with _disable_current_modes():  # a mesh reads its ranks, which a planner's fake tensors do not hold
            mesh = init_device_mesh(self.device.type, (self.world.size,))
        self._modules: dict[str, Any] = {}
        for base, module in bases.items():
            for layer in module.layers():
                fully_shard(layer, mesh=mesh)
            self._modules[base] = fully_shard(module, mesh=mesh)

    def declare_trained(self, roles: Mapping[str, Sequence[nn.Parameter]], passes: Mapping[str, Sequence[str]]) -> None:
        """See ``Strategy.declare_trained``.

        Raises:
            CaseError: adapters outside the layers have another dtype than a head that is trained beside them.
        """
        for module in self._modules.values():
            inside = {id(parameter) for layer in module.layers() for parameter in layer.parameters()}
            dtypes = {p.dtype for p in module.parameters() if p.requires_grad and id(p) not in inside}
            if len(dtypes) > 1 and self.options.lora.dtype is not None:  # torch would fail an assertion in a forward
                problem = (
                    f"lora.dtype is {self.options.lora.dtype!r}: fsdp reduces the gradients of adapters outside the "
                    "layers with those of a head, which have another dtype, so it must be none."
                )
                raise CaseError([problem])

    def read(self, base: str, function: Callable[[], T]) -> T:
        """See ``Strategy.read``."""
        module = self._modules[base]
        result: T = module(function)
        module.reshard()  # the root stays gathered for a backward, and none follows
        return result

    def generate(self, base: str, function: Callable[[], T]) -> T:
        """See ``Strategy.generate``."""
        if self.options.parallel.gather == "layer":
            return self.read(base, function)
        layers = self._layers(base)
        for layer in layers:
            layer.set_reshard_after_forward(False, recurse=False)
        try:
            return self.read(base, function)
        finally:
            for layer in layers:
                layer.set_reshard_after_forward(True, recurse=False)
                layer.reshard()

    def release(self, base: str) -> None:
        """See ``Strategy.release``."""
        del self._modules[base]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """See ``Strategy.whole``."""
        units = [unit for base, root in self._modules.items() for unit in (root, *self._layers(base))]
        try:
            for unit in units:
                unit.unshard()
            yield
        finally:
            for unit in units:
                unit.reshard()

    def _layers(self, base: str) -> list[Any]:
        from torch.distributed.fsdp import FSDPModule

        module = self._modules[base]
        return [layer for layer in module.modules() if isinstance(layer, FSDPModule) and layer is not module]

    def train(self, key: str, base: str, function: Callable[[], torch.Tensor], *, is_last: bool) -> torch.Tensor:
        """See ``Strategy.train``; gradients are reduced in every backward, since whole ones would not fit."""
        return self._modules[base](function)  # type: ignore[no-any-return]

    def all_ended(self, ended: bool) -> bool:
        """See ``Strategy.all_ended``: every layer is gathered by all ranks together."""
        return self.world.all_true(ended, self.device)

    @property
    def squared_norm(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """See ``Strategy.squared_norm``."""
        return self.world.all_sum


def by_storage(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Puts weights of one storage side by side, in their order there: a library that flattens a list leaves them so."""
    storages = [parameter.untyped_storage()._cdata for parameter in parameters]
    first = {storage: i for i, storage in reversed(list(enumerate(storages)))}
    places = [(first[storage], p.storage_offset()) for storage, p in zip(storages, parameters, strict=True)]
    return [parameters[i] for i in sorted(range(len(parameters)), key=places.__getitem__)]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor, divided or not, that this rank holds."""
    to_local: Callable[[], torch.Tensor] | None = getattr(tensor, "to_local", None)  # of torch's ``DTensor``
    return tensor if to_local is None else to_local()


def whole_numel(weight: torch.Tensor) -> int:
    """Elements of a weight over all ranks: ZeRO-3 leaves an empty one where it is not gathered."""
    return int(getattr(weight, "ds_numel", weight.numel()))
