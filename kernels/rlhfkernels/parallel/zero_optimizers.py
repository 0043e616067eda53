"""The optimizers of roles under DeepSpeed, which hold master weights and moments of a rank's part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rlhfkernels.config.options import OptimizerOptions
from rlhfkernels.parallel.gradient_norm import NORM_EPS, total_norm
from rlhfkernels.parallel.strategies import Schedule, Share
from rlhfkernels.parallel.world import World


def _states(optimizer: torch.optim.Optimizer, master: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from (held for held in optimizer.state[master].values() if isinstance(held, torch.Tensor))


def _state_bytes(optimizer: torch.optim.Optimizer, master: torch.Tensor) -> int:
    """Bytes of the states that ``make_optimizer``'s optimizer has for ``master`` once it has stepped.

    AdamW has both moments, and the count of steps as a float32 scalar; SGD without momentum has nothing.
    """
    return 2 * master.nbytes + 4 if isinstance(optimizer, torch.optim.AdamW) else 0


def make_optimizer(options: OptimizerOptions, groups: Sequence[Sequence[nn.Parameter]]) -> torch.optim.Optimizer:
    """Torch's optimizer, which DeepSpeed gives its partitions; the learning rate is set before every step."""
    named = [{"params": list(group)} for group in groups]
    if options.name == "sgd":
        return torch.optim.SGD(named, lr=0.0, weight_decay=options.weight_decay)
    return torch.optim.AdamW(
        named, lr=0.0, betas=(0.9, 0.999), eps=options.adam_epsilon, weight_decay=options.weight_decay, fused=True
    )


class ZeroOptimizer:
    """The optimizer of a role in stages 1 and 2: DeepSpeed reduces, clips, updates and gathers.

    Args:
        engine: of the role.
        schedule: the learning rate of a step.
    """

    def __init__(self, engine: Any, schedule: Schedule) -> None:
        self._engine, self._schedule = engine, schedule
        self._num_steps = 0

    def step(self) -> torch.Tensor:
        """See ``RoleOptimizer.step``."""
        self._update()
        return torch.as_tensor(self._engine.get_global_grad_norm())

    def _update(self) -> None:
        for group in self._engine.basic_optimizer.param_groups:
            group["lr"] = self._schedule(self._num_steps)
        self._num_steps += 1
        self._engine.step()

    def tensors(self) -> Iterator[torch.Tensor]:
        """See ``RoleOptimizer.tensors``."""
        for master in self._masters():
            yield master
            yield from _states(self._engine.basic_optimizer, master)

    def _masters(self) -> Iterator[torch.Tensor]:
        """The master weights of the rank's part: in float32, stage 0 steps the weights themselves."""
        for group in self._engine.basic_optimizer.param_groups:
            yield from group["params"]

    def share(self) -> Share:
        """See ``RoleOptimizer.share``. Torch's optimizers make their states in the first step."""
        masters, weights = list(self._masters()), self._weights()
        own = {id(weight) for weight in weights}
        count = sum(master.numel() for master in masters)
        read = sum(master.nbytes for master in masters if id(master) in own)
        held = sum(master.nbytes for master in masters if id(master) not in own)
        held += sum(_state_bytes(self._engine.basic_optimizer, master) for master in masters)
        return Share(count, count * weights[0].element_size(), read, held)

    def _weights(self) -> Sequence[nn.Parameter]:
        """The weights of the role."""
        return list(self._engine.module.parameters())


class ReplicatedOptimizer(ZeroOptimizer):
    """The optimizer of a role in stage 0: gradients are averaged in one all-reduce, every rank updates all weights."""

    def step(self) -> torch.Tensor:
        """See ``RoleOptimizer.step``."""
        self._engine.allreduce_gradients()
        grads = [parameter.grad for parameter in self._engine.module.parameters() if parameter.grad is not None]
        norm = total_norm(grads)
        self._update()
        return norm


class DividedOptimizer(ZeroOptimizer):
    """The optimizer of a role in stage 3.

    DeepSpeed clips all weights of an engine together, and updates them together. Here each role's gradient is clipped
    to its own norm, and the last role of a base runs the engine's step: no pass lies between the roles' steps.
    """

    def __init__(
        self,
        base: DividedBase,
        group: int,
        parameters: Sequence[nn.Parameter],
        schedule: Schedule,
        *,
        world: World,
        max_grad_norm: float,
    ) -> None:
        super().__init__(base.engine, schedule)
        self._base, self._group, self._parameters = base, group, parameters
        self._world, self._max_grad_norm = world, max_grad_norm

    def step(self) -> torch.Tensor:
        """See ``RoleOptimizer.step``."""
        norm = self._clip()
        self._engine.basic_optimizer.param_groups[self._group]["lr"] = self._schedule(self._num_steps)
        self._num_steps += 1
        self._base.step()
        return norm

    def _clip(self) -> torch.Tensor:
        """Clips the role's gradient to its norm over all ranks, and returns the norm before."""
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        grads = [safe_get_local_grad(parameter) for parameter in self._parameters]
        norm = self._world.all_sum(torch.stack([grad.square().sum() for grad in grads]).sum()).sqrt()
        factor = (self._max_grad_norm / (norm + NORM_EPS)).clamp_(max=1.0)
        for parameter, grad in zip(self._parameters, grads, strict=True):
            safe_set_local_grad(parameter, grad * factor)
        return norm

    def _masters(self) -> Iterator[torch.Tensor]:
        """The master weights of the rank's part."""
        zero = self._engine.optimizer
        for i, master in enumerate(zero.fp32_partitioned_groups_flat):
            if zero.sub_group_to_group_id[i] == self._group:
                yield master

    def _weights(self) -> Sequence[nn.Parameter]:
        """The weights of the role."""
        return self._parameters


class DividedBase:
    """The engine of a base in stage 3, which steps when all of its roles have.

    Args:
        engine: DeepSpeed's.
        roles: the weights of the base that each of its roles owns.
    """

    def __init__(self, engine: Any, roles: Mapping[str, Sequence[nn.Parameter]]) -> None:
        self.engine, self.roles = engine, roles
        self._num_ready = 0

    @property
    def coordinator(self) -> Any:
        """DeepSpeed's, which gathers weights and lets go of them."""
        zero = self.engine.optimizer  # where nothing is trained, what gathers is in the optimizer's place
        return getattr(zero, "parameter_offload", zero).get_param_coordinator()

    def step(self) -> None:
        """Notes that one role is ready; with the last, all are updated."""
        self._num_ready += 1
        if self._num_ready == len(self.roles):
            self._num_ready = 0
            self.engine.step()
            self._clear()

    def _clear(self) -> None:
        """Sets the gradients to zero.

        A step's first backward overwrites them and the others add: what the first does not train would keep its own.
        """
        from deepspeed.utils import safe_set_local_grad

        for parameters in self.roles.values():
            for parameter in parameters:
                safe_set_local_grad(parameter, torch.zeros_like(part_of(parameter)))


def part_of(parameter: nn.Parameter) -> torch.Tensor:
    """The rank's part of a weight in stage 3, flat."""
    part: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    return part
