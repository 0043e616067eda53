"""A training step as the measurements see it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from rlhfkernels.methods.phases import Phase
from rlhfkernels.observer import Observer


class Stats(Protocol):
    """Statistics of one step."""

    def check_finite(self) -> None:
        """Raises NumericalError if a loss, a gradient norm or the like is not finite."""

    def to_dict(self) -> dict[str, float | None]:
        """Returns the ``stats`` object of the record."""


class Step(Protocol):
    """A training step as the measurements see it; see ``rlhfkernels.training.step``."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases in the order in which they run."""

    def run(self, observer: Observer) -> Stats:
        """Runs one complete step on the next batch."""

    def persistent_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Yields (part, tensor) for everything that lives between steps."""

    def trained_parameters(self) -> Sequence[torch.nn.Parameter]:
        """Returns the parameters that get gradients."""

    def rewind(self) -> None:
        """Has the next step read the first rows of the data again."""

    def data_summary(self) -> dict[str, Any]:
        """Returns the ``prompts`` object of the record."""

    @property
    def trunk_used(self) -> str:
        """The trunks that run, the actor's first: ``fast``, ``plain`` or both, joined by a comma."""

    @property
    def attention_used(self) -> str:
        """The attention implementations of the trunks, the actor's first: ``sdpa``, ``eager`` or both."""

    @property
    def backend_used(self) -> str:
        """The backend of the ops: ``triton``, ``native`` or ``torch``."""
