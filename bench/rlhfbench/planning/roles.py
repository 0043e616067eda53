"""ZeRO's stages 0 to 2 on fake tensors: a step without DeepSpeed, which says what happens to each gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable

from rlhfbench.measure.tally import Change
from rlhfbench.planning.partitions import ENDED, GRADIENT, MADE, REDUCED, STEPPED
from rlhfkernels.parallel.strategies import RoleOptimizer, Schedule, Share, Strategy, by_storage

Tell = Callable[[Change], object]


class PlannedRoles(Strategy):
    """Stands in for ``rlhfkernels.parallel.deepspeed`` in stages 0 to 2.

    Args:
        arguments: as ``Strategy``.
        stage: 0 to 2.
        num_ranks: that divide the optimizer states in stages 1 and 2.
        tell: is told what happens to gradients; see ``rlhfbench.planning.partitions``.
        more: as ``Strategy``.
    """

    def __init__(self, *arguments: Any, stage: int, num_ranks: int, tell: Tell, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.stage, self.num_ranks, self.tell = stage, num_ranks, tell

    def declare_trained(self, roles: Mapping[str, Sequence[nn.Parameter]], passes: Mapping[str, Sequence[str]]) -> None:
        """See ``Strategy.declare_trained``."""
        self._roles = {role: _Role(self, role, by_storage(weights)) for role, weights in roles.items() if weights}

    def optimizer(self, role: str, schedule: Schedule) -> RoleOptimizer:
        """See ``Strategy.optimizer``."""
        return self._roles[role]


class _Role:
    """The gradients of a role, and a rank's part of its master weights and moments."""

    def __init__(self, strategy: PlannedRoles, role: str, weights: Sequence[nn.Parameter]) -> None:
        self._strategy, self._role, self._weights = strategy, role, weights
        self._places = {id(weight): place for place, weight in enumerate(weights)}
        self._at = 0
        self._ends_backward = False
        num_held = 0 if strategy.options.optimizer.name == "sgd" else 2
        num_counts = 0 if not num_held else 1 if strategy.stage else len(weights)  # of AdamW's steps
        self._has_copies = strategy.stage > 0 or weights[0].dtype.itemsize < 4
        num_held += self._has_copies
        num_ranks = strategy.num_ranks if strategy.stage else 1
        # A tensor for each weight, so that one layer more adds what the layer before it added.
        self._parts = [-(-weight.numel() // num_ranks) for weight in weights]
        sizes = [size for size in self._parts for _ in range(num_held)]
        self._held = [weights[0].new_empty(size, dtype=torch.float32) for size in [*sizes, *[1] * num_counts]]
        for weight in weights:
            weight.register_post_accumulate_grad_hook(self._made)  # type: ignore[no-untyped-call]

    def _tell(self, event: str, offset: int = 0) -> None:
        self._strategy.tell((GRADIENT, event, self._role, offset))

    @torch.no_grad()
    def _made(self, weight: torch.Tensor) -> None:
        if self._strategy.stage != 2:
            self._tell(MADE)
            return
        if not self._ends_backward:
            self._ends_backward = True
            Variable._execution_engine.queue_callback(self._end)
        self._reduce(weight)

    def _reduce(self, weight: torch.Tensor) -> None:
        """Moves the gradient of a weight into the bucket."""
        place, count = self._places[id(weight)], len(self._weights)
        # The shorter way round: the same at any depth, where layers lie between the first weights and the last.
        offset = (place - self._at + count // 2) % count - count // 2
        self._at = place
        self._tell(REDUCED, offset)
        weight.grad = None

    def _end(self) -> None:
        self._ends_backward = False
        self._at = 0
        self._tell(ENDED)

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """See ``RoleOptimizer.step``."""
        if self._strategy.stage == 1:
            for weight in self._weights:
                self._reduce(weight)
            self._end()
        self._tell(STEPPED)
        for weight in self._weights:
            weight.grad = None
        return self._held[0].new_zeros(()) if self._held else torch.zeros(())

    def tensors(self) -> Iterator[torch.Tensor]:
        """See ``RoleOptimizer.tensors``."""
        yield from self._held

    def share(self) -> Share:
        """See ``RoleOptimizer.share``."""
        count = sum(self._parts)
        num_bytes = count * self._weights[0].element_size()
        return Share(count, num_bytes, 0 if self._has_copies else num_bytes, sum(held.nbytes for held in self._held))
