"""Losses, advantages, rewards and selection: plain functions of tensors, one file a family.

``OBJECTIVES`` and ``DERIVATIONS`` are the names that a method's program may use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from rlhfkernels.algorithms import best_of_n, dpo, ppo, sft
from rlhfkernels.algorithms.common import Counts, Loss, Reader
from rlhfkernels.config.options import Options
from rlhfkernels.data.batch import Batch


@dataclasses.dataclass(frozen=True, slots=True)
class Objective:
    """A loss over quantities that are read with a graph.

    Attributes:
        function: of a reader, a micro-batch, the options and the divisors.
        reads_prompt: says whether the loss covers the prompt's tokens too, under the options.
    """

    function: Callable[[Reader, Batch, Options, Counts], Loss]
    reads_prompt: Callable[[Options], bool] = lambda options: False


OBJECTIVES: dict[str, Objective] = {
    "policy": Objective(ppo.policy),
    "value": Objective(ppo.value),
    "pairs": Objective(dpo.pairs),
    "demonstrations": Objective(sft.demonstrations, reads_prompt=lambda options: not options.sft.completion_only_loss),
}

# Each fills columns of the batch and returns statistics, scalars by name.
DERIVATIONS: dict[str, Callable[[Batch, Options], dict[str, torch.Tensor]]] = {
    "advantages": ppo.advantages,
    "best_of_n": best_of_n.select,
}
