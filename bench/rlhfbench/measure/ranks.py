"""Measurements of all ranks of a case together: the objects of rank 0's record that are made from all ranks."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rlhfbench.measure.collectives import CollectiveCounter
from rlhfbench.measure.statistic import midmean
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import ParallelOptions
from rlhfkernels.observer import Observer
from rlhfkernels.parallel.world import World

Steps = Sequence[Mapping[str, float]]


def measure_collectives(run: Callable[[Observer], object], device: str, world: World) -> CollectiveCounter:
    """Runs one step whose collectives are counted and timed. All ranks begin it together."""
    counter = CollectiveCounter(device)
    world.barrier()
    with counter:
        run(counter)
    return counter


def communication(counter: CollectiveCounter, device: str) -> dict[str, Any]:
    """The account of one rank of the collectives of a step, by phase.

    Returns:
        ``collectives``: calls and bytes by phase and name. ``communication_step_s``: seconds of each phase in the
        observed step. ``waiting_s``: seconds of waiting within these; ``None`` on CUDA, where a device waits and not
        the process.
    """
    on_cpu = torch.device(device).type == "cpu"
    return {
        "collectives": {
            phase: {name: {"calls": n, "bytes": counter.num_bytes[phase][name]} for name, n in calls.items()}
            for phase, calls in counter.calls.items()
        },
        "communication_step_s": counter.phase_s,
        "waiting_s": {phase: counter.waiting_s.get(phase, 0.0) for phase in counter.phase_s} if on_cpu else None,
    }


def slowest(totals: Sequence[Steps]) -> int:
    """The rank whose timed steps took the longest in total, the first of equals.

    A record's seconds are those of one rank: each waits for the others somewhere, so that the longest phases of
    different ranks add up to more than the step.
    """
    sums = [math.fsum(seconds for step in steps for seconds in step.values()) for steps in totals]
    return sums.index(max(sums))


def slowest_steps(steps_s: list[dict[str, float]], world: World) -> list[dict[str, float]]:
    """The timed steps of the slowest rank."""
    found = world.gather(steps_s)
    return list(found[slowest(found)])


def own_s(seconds: float, world: World) -> float:
    """CPU seconds of all ranks on this machine."""
    return math.fsum(spent for host, spent in world.gather((platform.node(), seconds)) if host == platform.node())


def gather(
    case: Case,
    world: World,
    counter: CollectiveCounter,
    steps_s: list[dict[str, float]],
    memory: dict[str, Any],
    timeline: dict[str, Any] | None,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """Gathers what the ranks measured.

    Args:
        case: Of this rank, with its device.
        world: The ranks.
        counter: Has observed a step of this rank.
        steps_s: Seconds by phase of its timed steps.
        memory: Its ``memory`` object.
        timeline: Its timeline.

    Returns:
        The ``world`` object of the record; memory and timeline of the rank with the highest total.
    """
    mine = {
        "host": platform.node(),
        "device": case.device,
        "num_threads": torch.get_num_threads(),
        "memory": memory,
        "timeline": timeline,
        "steps_s": steps_s,
        **communication(counter, case.device),
    }
    ranks = world.gather(mine)
    found = world_object(case.options.parallel, ranks)
    worst = ranks[found["worst_rank"]]
    return found, worst["memory"], worst["timeline"]


def world_object(parallel: ParallelOptions, ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ``world`` object of a record, which is measured in its first block: ``slowest_rank`` and all seconds too.

    Args:
        parallel: options of the case.
        ranks: of each rank ``host``, ``device``, ``num_threads``, ``memory`` (as in a record), ``steps_s`` (seconds by
            phase of each timed step), and the keys of ``communication``.
    """
    first = ranks[0]
    totals = [rank["memory"]["total_bytes"] for rank in ranks]
    waiting, spent = _sums(ranks, "waiting_s"), _sums(ranks, "communication_step_s")
    return {
        "size": len(ranks),
        "parallel": parallel.strategy,
        "zero_stage": parallel.zero_stage if parallel.strategy == "deepspeed" else None,
        "gather": parallel.gather if parallel.divides_weights else None,
        "worst_rank": totals.index(max(totals)),
        "slowest_rank": slowest([rank["steps_s"] for rank in ranks]),
        "collectives": first["collectives"],
        "communication_bytes": sum(c["bytes"] for calls in first["collectives"].values() for c in calls.values()),
        "communication_calls": sum(c["calls"] for calls in first["collectives"].values() for c in calls.values()),
        "waiting_share": None if None in waiting or not sum(spent) else math.fsum(waiting) / math.fsum(spent),
        "imbalance": imbalance(ranks),
        "ranks": [_rank_object(number, rank) for number, rank in enumerate(ranks)],
    }


def imbalance(ranks: Sequence[Mapping[str, Any]]) -> float | None:
    """The inequality of the ranks: the largest of their seconds without waiting, over the mean, minus 1.

    ``None`` where waiting was not measured.
    """
    waiting, spent = _sums(ranks, "waiting_s"), _sums(ranks, "communication_step_s")
    if None in waiting:
        return None
    busy = [seconds - waited for seconds, waited in zip(spent, waiting, strict=True)]
    mean = math.fsum(busy) / len(busy)
    return max(busy) / mean - 1 if mean > 0 else None


def _sums(ranks: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    """The sum over phases of each rank; ``None`` where it was not measured."""
    return [None if rank[key] is None else math.fsum(rank[key].values()) for rank in ranks]


def _rank_object(number: int, rank: Mapping[str, Any]) -> dict[str, Any]:
    memory = rank["memory"]
    steps = rank["steps_s"]
    timed_s = midmean(steps, {name: None for step in steps for name in step})
    phases = memory["phases"]
    return {
        "rank": number,
        "host": rank["host"],
        "device": rank["device"],
        "num_threads": rank["num_threads"],
        "total_bytes": memory["total_bytes"],
        "peak_phase": memory["peak_phase"],
        "host_peak_bytes": memory["views"]["host_peak_bytes"],
        "parts": memory["parts"],
        "collectives": rank["collectives"],
        "phases": {
            name: {
                "mean_s": timed_s.get(name),
                "communication_step_s": rank["communication_step_s"].get(name),
                "waiting_s": None if rank["waiting_s"] is None else rank["waiting_s"].get(name),
                "total_bytes": phases[name]["total_bytes"] if name in phases else None,
                "parts": phases[name]["parts"] if name in phases else None,
            }
            for name in dict.fromkeys([*phases, *timed_s])
        },
    }
