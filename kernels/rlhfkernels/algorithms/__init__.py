"""Losses, advantages, rewards and selection: plain functions of tensors, one file a family.

``OBJECTIVES`` and ``DERIVATIONS`` are the names that a method's program may use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from rlhfkernels.algorithms import best_of_n, dpo, ppo, sft
from rlhfkernels.algorithms.common import AllSum, Counts, Loss, Reader
from rlhfkernels.config.options import Options
from rlhfkernels.data.batch import Batch


@dataclasses.dataclass(frozen=True, slots=True)
class Objective:
    """A loss over quantities that are read with a graph.

    Attributes:
        function: of a reader, a micro-batch, the options and the divisors.
        reads_prompt: says whether the loss covers the prompt's tokens too, under the options.
        packs: says whether the sequences of a micro-batch are read as one row without padding.
        in_two_passes: says whether the loss reads its log-probabilities without a graph first, and the sequences of a
            data row then have a graph each. For losses that read nothing but log-probabilities.
        divides_by_tokens: the divisor is the number of tokens, not of data rows.
    """

    function: Callable[[Reader, Batch, Options, Counts], Loss]
    reads_prompt: Callable[[Options], bool] = lambda options: False
    packs: Callable[[Options], bool] = lambda options: False
    in_two_passes: Callable[[Options], bool] = lambda options: False
    divides_by_tokens: bool = True


OBJECTIVES: dict[str, Objective] = {
    "policy": Objective(ppo.policy),
    "value": Objective(ppo.value),
    "pairs": Objective(
        dpo.pairs, in_two_passes=lambda options: options.dpo.forward == "two-pass", divides_by_tokens=False
    ),
    "demonstrations": Objective(
        sft.demonstrations,
        reads_prompt=lambda options: not options.sft.completion_only_loss,
        packs=lambda options: options.sft.packing,
    ),
}

# Each fills columns of the batch and returns statistics, scalars by name. ``AllSum`` is over the ranks of the step.
DERIVATIONS: dict[str, Callable[[Batch, Options, AllSum], dict[str, torch.Tensor]]] = {
    "advantages": ppo.advantages,
    "best_of_n": best_of_n.select,
}
