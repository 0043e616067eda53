"""Checks of cases of several ranks, before a run starts: are there so many devices. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from rlhfbench.launch import find_launch
from rlhfbench.processes import num_cores
from rlhfkernels.config.case import Case

# More ranks on a CPU than this only wait for each other.
MAX_RANKS_PER_CORE = 4


def check_ranks(cases: Iterable[Case], num_cuda_devices: Callable[[], int]) -> Iterator[str]:
    """One sentence for each world size and device that this machine, or its launcher, cannot run.

    Args:
        cases: of a sweep.
        num_cuda_devices: counts the devices of this machine.
    """
    launch = find_launch()
    for size, device in dict.fromkeys(
        (case.options.parallel.world_size, case.device) for case in cases if case.options.parallel.strategy is not None
    ):
        if device.startswith("cuda:"):
            yield f"device is {device!r}: every rank takes the device of its own number, so it must be 'cuda'."
        elif launch is not None:
            if size > launch.size:
                yield f"world-size is {size}: the launcher started {launch.size} processes, one for each rank."
            elif device == "cuda" and (here := launch.num_local(size)) > (number := num_cuda_devices()) > 0:
                yield (
                    f"world-size is {size}: {here} of its ranks are on this machine, so each process must see {here} "
                    f"CUDA devices, and this one sees {number}."
                )
        elif device == "cuda" and size > (number := num_cuda_devices()) > 0:
            yield f"world-size is {size}: this machine has {number} CUDA device{'s' if number > 1 else ''}."
        elif device == "cpu" and size > (limit := MAX_RANKS_PER_CORE * num_cores()):
            yield f"world-size is {size}: on the CPU of this machine, it must be at most {limit}, four ranks a core."
