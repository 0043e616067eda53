"""The needs of a sweep's cases: devices and memory of a node, and the cases that stay together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

from rlhfbench.cluster.nodes import Need
from rlhfbench.files import write_atomically
from rlhfbench.processes import map_parallel
from rlhfbench.records.checks import fits
from rlhfbench.runs.options import RunOptions
from rlhfkernels.config.case import Case
from rlhfkernels.errors import RlhfKernelsError

PLANNED_NAME = "planned_bytes.json"
# What a process on a CPU takes beside its tensors. The libraries take 0.36 GiB.
PROCESS_BYTES = 2**29

# Which cases run on one machine, so that their times compare: those for which the function returns the same.
GROUPS: Mapping[str, Callable[[Case], Hashable]] = {
    "sweep": lambda case: "",
    "model": lambda case: case.model,
    "size": lambda case: (case.model, case.device, case.dtype, case.prompt_len, case.completion_len, case.batch_size),
    "case": lambda case: case.id,
}


def needs_of(
    cases: Sequence[Case], options: RunOptions, folder: Path, tell: Callable[[str], None]
) -> Callable[[Case], Need]:
    """Returns the function that says what one of ``cases`` needs.

    Their memory is planned once: the plans are kept in the run's folder.

    Args:
        cases: the cases.
        options: how they are run. ``num_threads`` is the number of cores of a case.
        folder: folder of the run.
        tell: receives a notice before cases are planned.
    """
    planned = _planned_bytes(cases, folder / PLANNED_NAME, tell)

    def need_of(case: Case) -> Need:
        kind = case.device.partition(":")[0]
        needed = planned.get(case.id)
        if needed is not None and options.memory_limit_bytes is not None:
            needed = min(needed, options.memory_limit_bytes)  # beyond it the case is out of memory anywhere
        num_ranks = case.options.parallel.world_size
        if needed is not None and kind == "cpu":
            needed = num_ranks * (needed + PROCESS_BYTES)
        num_cores = None if options.num_threads is None else num_ranks * options.num_threads
        return Need(device=kind, num_ranks=num_ranks, num_cores=num_cores, memory_bytes=needed)

    return need_of


def _planned_bytes(cases: Sequence[Case], path: Path, tell: Callable[[str], None]) -> dict[str, int | None]:
    """The planned total of each case by its id; ``None`` for a case that cannot be planned."""
    planned = _read_planned(path)
    missing = {dataclasses.replace(case, seed=0): None for case in cases if case.id not in planned}
    if missing:
        tell(f"{len(missing)} cases are planned, to place them by the memory that they need.")
        found = dict(zip(missing, map_parallel(_total_bytes, list(missing), preload=_PRELOAD), strict=True))
        planned |= {case.id: found.get(dataclasses.replace(case, seed=0), planned.get(case.id)) for case in cases}
        write_atomically(path, json.dumps(planned) + "\n")
    return planned


def _read_planned(path: Path) -> dict[str, int | None]:
    """The totals in ``path``; none where it holds something else, since they can be planned again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and all(fits(value, "Int64") for value in found.values()) else {}


_PRELOAD = ("rlhfbench.planning.predict",)


def _total_bytes(case: Case) -> int | None:
    # Imported in the processes that plan: it takes a second.
    from rlhfbench.planning.predict import plan_case

    try:
        return int(plan_case(case).memory["total_bytes"])
    except RlhfKernelsError:
        return None  # the case itself will say why
