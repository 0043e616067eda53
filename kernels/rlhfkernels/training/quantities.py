"""The quantities that a program reads from a role, without a graph into columns and with one for objectives.

Shapes: n = sequences, p = prompt length, c = completion length, d = hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from rlhfkernels.algorithms.common import sequence_logprobs
from rlhfkernels.data.batch import Batch, PackedRow
from rlhfkernels.engine.engine import Engine


@dataclasses.dataclass(frozen=True, slots=True)
class Quantity:
    """Something that a role says of every sequence or of every completion token.

    Attributes:
        read: the quantity from hidden states [n, m, d] of the last m > c positions.
        positions: of a sequence, from p and c: those of the hidden states that it is read from.
        per_token: [n, c] where true, else [n].
    """

    read: Callable[[Engine, str, torch.Tensor, Batch], torch.Tensor]
    positions: Callable[[int, int], range]
    per_token: bool

    def new_column(self, batch: Batch) -> torch.Tensor:
        """Zeros, float32, on the batch's device."""
        return torch.zeros_like(batch.mask if self.per_token else batch.mask[:, 0])


def _logprobs(engine: Engine, role: str, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    return engine.logprobs(role, hidden, batch.completions)[0]


def _sequence_logprob(engine: Engine, role: str, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    return sequence_logprobs(_logprobs(engine, role, hidden, batch), batch.mask)


def predicting_positions(prompt_len: int, completion_len: int) -> range:
    """The positions whose hidden states predict the completion: each of its tokens is read one position before."""
    return range(prompt_len - 1, prompt_len + completion_len - 1)


def _last_position(prompt_len: int, completion_len: int) -> range:
    return range(prompt_len + completion_len - 1, prompt_len + completion_len)


QUANTITIES: dict[str, Quantity] = {
    "logprobs": Quantity(_logprobs, predicting_positions, per_token=True),
    "sequence_logprob": Quantity(_sequence_logprob, predicting_positions, per_token=False),
    "values": Quantity(Engine.values, predicting_positions, per_token=True),
    "last_scalar": Quantity(Engine.last_scalar, _last_position, per_token=False),
}


@dataclasses.dataclass(frozen=True, slots=True)
class GraphReader:
    """One role over one micro-batch, with a graph; see ``rlhfkernels.algorithms.common.Reader``."""

    engine: Engine
    role: str
    hidden: torch.Tensor
    batch: Batch

    def logprobs(self, *, entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See ``Reader.logprobs``."""
        return self.engine.logprobs(self.role, self.hidden, self.batch.completions, entropy=entropy)

    def all_logprobs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Reader.all_logprobs``."""
        logprobs, _ = self.engine.logprobs(self.role, self.hidden, self.batch.tokens[:, 1:])
        return logprobs, self.batch.predicted_mask

    def values(self) -> torch.Tensor:
        """See ``Reader.values``."""
        return self.engine.values(self.role, self.hidden, self.batch)


@dataclasses.dataclass(frozen=True, slots=True)
class PackedReader:
    """One role over the packed row of a micro-batch; see ``rlhfkernels.algorithms.common.Reader``.

    Results have the shapes of padded rows, with 0 on padding.
    """

    engine: Engine
    role: str
    hidden: torch.Tensor
    row: PackedRow
    batch: Batch

    def logprobs(self, *, entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See ``Reader.logprobs``."""
        logprobs, entropies = self._read(entropy)
        mask = self.batch.mask
        return _spread(logprobs, mask), None if entropies is None else _spread(entropies, mask)

    def all_logprobs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Reader.all_logprobs``."""
        mask = self.batch.predicted_mask
        return _spread(self._read(entropy=False)[0], mask), mask

    def values(self) -> torch.Tensor:
        """Not read by an objective that packs."""
        raise NotImplementedError

    def _read(self, entropy: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        states = self.row.predicting(self.hidden)
        return self.engine.flat_logprobs(self.role, states, self.row.targets, entropy=entropy)


def _spread(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values [k] at the k ones of ``mask``, [n, m], in order; 0 elsewhere."""
    return torch.zeros_like(mask, dtype=values.dtype).masked_scatter(mask.bool(), values)


class LeafReader:
    """Log-probabilities that were read without a graph; see ``rlhfkernels.algorithms.common.Reader``.

    Args:
        logprobs: [n, c], of the completion tokens.
    """

    def __init__(self, logprobs: torch.Tensor) -> None:
        self._logprobs = logprobs.requires_grad_()

    @property
    def gradient(self) -> torch.Tensor:
        """The gradient [n, c] of the loss, once it was differentiated."""
        assert self._logprobs.grad is not None, "the loss reads the log-probabilities"
        return self._logprobs.grad

    def logprobs(self, *, entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See ``Reader.logprobs``."""
        if entropy:
            raise NotImplementedError
        return self._logprobs, None

    def all_logprobs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Not read by an objective in two passes."""
        raise NotImplementedError

    def values(self) -> torch.Tensor:
        """Not read by an objective in two passes."""
        raise NotImplementedError
