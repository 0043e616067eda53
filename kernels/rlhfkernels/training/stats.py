"""The statistics of a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from rlhfkernels.algorithms.common import Loss
from rlhfkernels.errors import NumericalError
from rlhfkernels.parallel.world import World


@dataclasses.dataclass(kw_only=True, slots=True)
class StepStats(Mapping[str, torch.Tensor]):
    """Statistics of a step: scalars on the device, so that reading them is the caller's synchronization.

    As a mapping it holds every statistic by name: those of the method (``score`` and ``kl`` of a rollout,
    ``ratio_error`` of PPO, ``accuracy`` of DPO), the losses as ``actor_loss`` and the gradient norms as
    ``actor_grad_norm``.

    Attributes:
        metrics: the method's statistics. Those of the rollout are of the whole batch; those of the objectives too in
            the first step; in later steps they are of the first mini-batch.
        losses: loss of each trained role over the last mini-batch.
        grad_norms: gradient norm of each optimizer over the last mini-batch, before clipping.

    Statistics are over the rows of all ranks, except that losses and statistics of the objectives are over this rank's
    rows in steps after the first: those steps are timed, and send nothing that training does not need. They are divided
    by the ranks' mean number of tokens, so that the mean of the ranks' losses is the loss of all rows.
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


@dataclasses.dataclass(slots=True)
class ObjectiveStatistics:
    """Losses and statistics of objectives, which add up over the micro-batches of a mini-batch or of the whole batch.

    Attributes:
        losses: by role.
        sums: statistics that add up.
        maxima: statistics of which the largest counts.
    """

    losses: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    sums: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    maxima: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, torch.Tensor]:
        """The statistics."""
        return self.sums | self.maxima

    def add(self, losses: Iterable[tuple[str, Loss]]) -> None:
        """Adds those of one micro-batch, of which ``losses`` are the objectives, each with its role."""
        for role, loss in losses:
            for total, found in ((self.losses, {role: loss.value.detach()}), (self.sums, loss.sums)):
                for name, value in found.items():
                    total[name] = total[name] + value if name in total else value
            for name, value in loss.maxima.items():
                self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value

    def of_all_ranks(self, world: World) -> ObjectiveStatistics:
        """Those of the rows of all ranks: divisors are a rank's mean share, so sums are averaged."""
        added = _together([self.losses, self.sums], lambda values: world.all_sum(values) / world.size)
        return ObjectiveStatistics(*added, *_together([self.maxima], world.all_max))


def _together(
    groups: Sequence[Mapping[str, torch.Tensor]], reduce: Callable[[torch.Tensor], torch.Tensor]
) -> list[dict[str, torch.Tensor]]:
    """``groups`` of scalars, reduced in one tensor."""
    values = [value for group in groups for value in group.values()]
    reduced = iter(reduce(torch.stack(values)) if values else ())
    return [{name: next(reduced) for name in group} for group in groups]
