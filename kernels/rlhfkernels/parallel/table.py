"""Which strategy carries out each ``parallel.strategy``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlhfkernels.config.options import Options
from rlhfkernels.parallel.deepspeed import make_deepspeed
from rlhfkernels.parallel.strategies import DataParallel, FullyShard, Strategy
from rlhfkernels.parallel.world import World

STRATEGIES: dict[str | None, Callable[[Options, World, torch.device], Strategy]] = {
    None: Strategy,
    "ddp": DataParallel,
    "fsdp": FullyShard,
    "deepspeed": make_deepspeed,
}
