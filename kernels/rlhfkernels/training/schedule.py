"""The learning rate of a step: linear warm-up and cosine decay."""

from __future__ import annotations

import math

from rlhfkernels.config.options import OptimizerOptions


def learning_rate(options: OptimizerOptions, peak: float | None, step: int) -> float:
    """The learning rate of a step, from 0; ``peak`` is that of the options where it is ``None``."""
    highest = options.learning_rate if peak is None else peak
    return highest * cosine_factor(step, options.warmup_steps, options.max_steps)


def cosine_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up to 1 over ``warmup_steps``, then half a cosine to 0 at ``total_steps``."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
