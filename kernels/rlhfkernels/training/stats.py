"""The statistics of a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping

import torch

from rlhfkernels.algorithms.common import Loss
from rlhfkernels.errors import NumericalError


@dataclasses.dataclass(kw_only=True, slots=True)
class StepStats(Mapping[str, torch.Tensor]):
    """Statistics of a step: scalars on the device, so that reading them is the caller's synchronisation.

    As a mapping it holds every statistic by name: those of the method (``score`` and ``kl`` of a rollout,
    ``ratio_error`` of PPO, ``accuracy`` of DPO), the losses as ``actor_loss`` and the gradient norms as
    ``actor_grad_norm``.

    Attributes:
        metrics: the method's statistics. Those of the rollout are of the whole batch; those of the objectives too in
            the first step; in later steps they are of the first mini-batch.
        losses: loss of each trained role over the last mini-batch.
        grad_norms: gradient norm of each optimizer over the last mini-batch, before clipping.
    """

    metrics: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    losses: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    grad_norms: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def _all(self) -> dict[str, torch.Tensor]:
        losses = {f"{role}_loss": value for role, value in self.losses.items()}
        norms = {f"{role}_grad_norm": value for role, value in self.grad_norms.items()}
        return {**self.metrics, **losses, **norms}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def to_dict(self) -> dict[str, float | None]:
        """Every statistic as a number; ``None`` where it is not finite."""
        numbers = {name: float(value) for name, value in self.items()}
        return {name: number if math.isfinite(number) else None for name, number in numbers.items()}

    def check_finite(self) -> None:
        """Checks every statistic.

        Raises:
            NumericalError: one is not finite.
        """
        for name, value in self.items():
            if not math.isfinite(float(value)):
                raise NumericalError(f"{name} is {float(value)}: the step's numbers must be finite.")


def add_statistics(metrics: dict[str, torch.Tensor], losses: Iterable[tuple[str, Loss]]) -> None:
    """Adds one micro-batch's statistics to those of its mini-batch, or of the whole batch."""
    for _, loss in losses:
        for name, found in loss.sums.items():
            metrics[name] = metrics[name] + found if name in metrics else found
        for name, found in loss.maxima.items():
            metrics[name] = torch.maximum(metrics[name], found) if name in metrics else found
