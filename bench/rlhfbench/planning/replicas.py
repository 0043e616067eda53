"""Torch's ``DistributedDataParallel`` on fake tensors: gradients that end up in buckets, and no other rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rlhfkernels.parallel.strategies import Strategy


class PlannedReplicas(Strategy):
    """Stands in for ``rlhfkernels.parallel.strategies.DataParallel``.

    Buckets live between steps. In the last backward of its pass, each gradient is copied into its bucket as soon as it
    is complete, and freed. Those of earlier micro-batches wait for that beside the buckets.

    Args:
        arguments: as ``Strategy``.
        more: as ``Strategy``.
    """

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._pass: tuple[str, bool] | None = None  # the key of the pass that runs, and whether its last backward does

    def declare_trained(self, roles: Mapping[str, Sequence[nn.Parameter]], passes: Mapping[str, Sequence[str]]) -> None:
        """See ``Strategy.declare_trained``."""
        # A bucket for each weight, so that one layer more adds what the layer before it added.
        self._buckets = {
            (key, weight): torch.empty_like(weight, requires_grad=False)
            for key, found in passes.items()
            for role in found
            for weight in roles.get(role, ())
        }
        for weight in {weight: None for _, weight in self._buckets}:
            weight.register_post_accumulate_grad_hook(self._made)  # type: ignore[no-untyped-call]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See ``Strategy.tensors``."""
        yield from (("gradients", bucket) for bucket in self._buckets.values())

    def train(self, key: str, base: str, function: Callable[[], torch.Tensor], *, is_last: bool) -> torch.Tensor:
        """See ``Strategy.train``."""
        self._pass = key, is_last
        return super().train(key, base, function, is_last=is_last)

    def _made(self, weight: torch.Tensor) -> None:
        assert isinstance(weight, nn.Parameter)
        assert self._pass is not None, "a backward follows the forward of its pass"
        key, is_last = self._pass
        if is_last:
            weight.grad = self._buckets[key, weight]
