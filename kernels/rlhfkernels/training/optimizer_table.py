"""The optimizers by name, and the optimizer of a case."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from rlhfkernels.algorithms.common import AllSum
from rlhfkernels.config.options import OptimizerOptions
from rlhfkernels.training.adamw_8bit import AdamW8bit, AdamW8bitStates
from rlhfkernels.training.optimizers import SGD, AdamW, Optimizer

OptimizerClass = type[AdamW] | type[SGD] | type[AdamW8bitStates]
OPTIMIZERS: dict[str, OptimizerClass] = {"adamw": AdamW, "sgd": SGD, "adamw8bit": AdamW8bit}
# For plans: the same memory without an optional package.
STAND_INS: dict[str, OptimizerClass] = {**OPTIMIZERS, "adamw8bit": AdamW8bitStates}


def make_optimizer(
    options: OptimizerOptions,
    parameters: Sequence[nn.Parameter],
    *,
    learning_rate: float | None = None,
    computes: bool = True,
    all_ranks: AllSum | None = None,
) -> Optimizer:
    """Makes the optimizer that ``options`` name.

    Args:
        options: of the case.
        parameters: the trained weights.
        learning_rate: peak learning rate; ``None`` is that of the options.
        computes: ``False`` for a plan: the memory alone counts, and no optional package is needed.
        all_ranks: see ``Optimizer``.

    Raises:
        CaseError: an optional package is not installed.
    """
    return (OPTIMIZERS if computes else STAND_INS)[options.name](
        parameters,
        lr=options.learning_rate if learning_rate is None else learning_rate,
        warmup_steps=options.warmup_steps,
        total_steps=options.max_steps,
        max_grad_norm=options.max_grad_norm,
        all_ranks=all_ranks,
        weight_decay=options.weight_decay,
        eps=options.adam_epsilon,
    )
