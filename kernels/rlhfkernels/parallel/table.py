"""The strategy of each value of ``parallel.strategy``."""

from __future__ import annotations

from collections.abc import Callable

from rlhfkernels.parallel.deepspeed import make_deepspeed
from rlhfkernels.parallel.strategies import DataParallel, FullyShard, Strategy

STRATEGIES: dict[str | None, Callable[..., Strategy]] = {  # arguments as ``Strategy``
    None: Strategy,
    "ddp": DataParallel,
    "fsdp": FullyShard,
    "deepspeed": make_deepspeed,
}
