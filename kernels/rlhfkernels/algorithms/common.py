"""Types that objectives share: the reader of a role, the divisors, the result.

Shapes: n = sequences, b = data rows, c = completion length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch

# Adds a tensor up over the ranks of a step, in place.
AllSum = Callable[[torch.Tensor], torch.Tensor]


class Reader(Protocol):
    """Quantities of one role over one micro-batch, with a graph."""

    def logprobs(self, *, entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities [n, c] of the completion tokens, and their entropies [n, c] where asked for."""
        ...

    def all_logprobs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities [n, p + c − 1] of every token but the first, and the mask of real tokens among them."""
        ...

    def values(self) -> torch.Tensor:
        """Values [n, c]; the value of completion token t is read at position t − 1."""
        ...


class Counts(NamedTuple):
    """Divisors that the caller gives, so that an objective does not depend on how a batch is split.

    Attributes:
        tokens: real tokens of the whole mini-batch, a scalar: completion tokens, or all that are predicted where the
            objective reads the prompt too.
        rows: data rows of the whole mini-batch.
    """

    tokens: torch.Tensor
    rows: int


@dataclasses.dataclass(frozen=True, slots=True)
class Loss:
    """An objective over one micro-batch.

    Attributes:
        value: scalar, to be differentiated.
        sums: statistics that add up over the micro-batches of a mini-batch.
        maxima: statistics of which the largest counts.
    """

    value: torch.Tensor
    sums: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    maxima: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)


def masked_mean(values: torch.Tensor, mask: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """Σ values · mask / count.

    Args:
        values: [n, c].
        mask: [n, c].
        count: real tokens of the whole mini-batch, of which these rows may be a part.

    Returns:
        A scalar.

    Example:
        >>> masked_mean(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[1.0, 1.0, 0.0]]), 2)
        tensor(1.5000)
    """
    return (values * mask).sum() / count


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks where there is one."""
    return tensor


def sequence_logprobs(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """ℓ = Σ_t log π(y_t | x, y_<t) over real completion tokens.

    Args:
        logprobs: [n, c].
        mask: [n, c].

    Returns:
        [n].

    Example:
        >>> sequence_logprobs(torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
        tensor([-3.])
    """
    return (logprobs * mask).sum(1)
