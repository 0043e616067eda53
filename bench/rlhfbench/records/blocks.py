"""The blocks of a record, and what it says of time: the mean over blocks of each block's mid-mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhfbench.measure.interference import disturbance
from rlhfbench.measure.statistic import half_width, midmean
from rlhfbench.records.checks import fits
from rlhfbench.records.derived import ceiling, rows_per_step
from rlhfbench.records.schema import KINDS
from rlhfkernels.config.rules import shown
from rlhfkernels.training.roofline import Work

Block = dict[str, Any]
Values = Sequence[float | None]  # one per block, ``None`` for one that failed or is set aside

_MAX_SECONDS = 1e9
MIN_QUIET_BLOCKS = 3
_REASONS = ("precise", "steady", "budget")  # surest first
# In the order in which ``Work.floor_s`` takes them.
_CEILINGS = tuple(map(ceiling, ("matmul_flops_per_s", "copy_bytes_per_s", "read_bytes_per_s")))


def summarize(record: dict[str, Any]) -> dict[str, Any]:
    """Returns ``record`` with all that follows from its blocks; unchanged if none is whole.

    A record made before there were blocks keeps its figures: its phases have no kind.

    Disturbed blocks are set aside where three others are left. The rule reads the interference and no times, so it
    favours no result.

    Sets the seconds of phases, kinds and total with their half-widths and their values by block, those of ``prepare``,
    the floors and ``floor_fraction``, what disturbed the most disturbed block, and the least sure reason to stop.
    """
    blocks = (record["latency"] or {}).get("blocks") or []
    whole = [block for block in blocks if block.get("error") is None]
    phases = record["latency"]["phases"] or {}
    if not whole or not all(phase.get("kind") for phase in phases.values()):
        return record
    disturbed = [block for block in whole if disturbance(block.get("interference") or {})]
    quiet = [block for block in whole if block not in disturbed]
    counted = quiet if len(quiet) >= MIN_QUIET_BLOCKS else whole
    seconds = [_midmean(block) if block in counted else None for block in blocks]
    latency = {**record["latency"]}
    latency["phases"] = {name: {**phase, **_estimate(_sums(seconds, [name]))} for name, phase in phases.items()}
    for kind in (*KINDS, "total"):
        names = [name for name, phase in phases.items() if phase.get("kind") in ((kind,) if kind in KINDS else KINDS)]
        found = _estimate(_sums(seconds, names, rows_per_step(record))) if names else {}
        for key in ("mean_s", "half_width_s", "block_s"):
            latency[f"{kind}_{key.removeprefix('mean_')}_per_sample"] = found.get(key)
    prepared = [block["prepare_s_per_sample"] for block in counted if block.get("prepare_s_per_sample") is not None]
    latency["prepare_s_per_sample"] = math.fsum(prepared) / len(prepared) if prepared else None
    latency["stopped_because"] = max((block["stopped_because"] for block in counted), key=_REASONS.index)
    latency["num_disturbed_blocks"] = len(disturbed)
    latency["num_counted_blocks"] = len(counted)
    worst: Mapping[str, Any] = max((block["interference"] for block in disturbed), key=load_of, default={})
    latency["disturbed_by"] = disturbance(worst)
    return {**record, "latency": latency, "work": _work(record, whole, latency)}


def wrong_block(block: Any, names: Iterable[str]) -> str | None:
    """Returns one sentence on the first fault of a block as it was read from a file; ``None`` if it has none.

    Args:
        block: A block.
        names: The phases of its record.
    """
    if not isinstance(block, Mapping):
        return f"it is {shown(block)}: it must be an object."
    for key in ("error", "interference", "ceilings", "floors_s"):
        if block.get(key) is not None and not isinstance(block[key], Mapping):
            return f"{key} is {shown(block[key])}: it must be an object."
    for key in ("interference", "ceilings", "floors_s"):
        for name, value in (block.get(key) or {}).items():
            if not (fits(value, "Float64") or (name == "gpu_throttled" and isinstance(value, str))):
                return f"{key}.{name} is {shown(value)}: it must be a finite number."
    if block.get("error") is not None:
        return None
    if block.get("prepare_s_per_sample") is not None and not _is_seconds(block["prepare_s_per_sample"]):
        return f"prepare_s_per_sample is {shown(block['prepare_s_per_sample'])}: it must be a number of seconds."
    if block.get("stopped_because") not in _REASONS:
        return f"stopped_because is {shown(block.get('stopped_because'))}: it must be one of {', '.join(_REASONS)}."
    phases = block.get("phases")
    if not isinstance(phases, Mapping) or not phases or set(phases) != set(names):
        return f"phases is {shown(phases)}: it must have the phases of its record."
    num_steps = {len(samples) if isinstance(samples, list) else 0 for samples in phases.values()}
    for name, samples in phases.items():
        if len(num_steps) > 1 or 0 in num_steps or not all(map(_is_seconds, samples)):
            return f"phases.{name} is {shown(samples)}: it must be a list of seconds, as many as other phases have."
    missing = [name for name in phases if block.get("floors_s") and block["floors_s"].get(name) is None]
    return f"floors_s.{missing[0]} is missing: every phase must have one." if missing else None


def _is_seconds(value: Any) -> bool:
    return value is not None and fits(value, "Float64") and 0 <= value <= _MAX_SECONDS


def _midmean(block: Block) -> dict[str, float]:
    return midmean(_steps(block), block["phases"])


def _steps(block: Block) -> list[dict[str, float]]:
    phases = block["phases"]
    return [dict(zip(phases, step, strict=True)) for step in zip(*phases.values(), strict=True)]


def _sums(seconds: Sequence[Mapping[str, float] | None], names: Sequence[str], divisor: int = 1) -> list[float | None]:
    return [None if block is None else math.fsum(block[name] for name in names) / divisor for block in seconds]


def block_values(record: Mapping[str, Any]) -> list[dict[str, float] | None]:
    """Returns seconds per sample of every block: ``total``, the kinds, and each phase; ``None`` for a failed block."""
    return [
        None if block.get("error") is not None else _quantities(record, _midmean(block))
        for block in record["latency"]["blocks"] or ()
    ]


def step_values(record: Mapping[str, Any], block: Block) -> list[dict[str, float]]:
    """Returns what ``block_values`` does for every step of one whole block."""
    return [_quantities(record, step) for step in _steps(block)]


def _quantities(record: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds per sample: ``total``, the kinds, and each phase, from the seconds of the phases.

    A phase that has the name of a kind, such as ``update`` of DPO, is ``phase update``: the kind is the sum.
    """
    kinds = {name: phase.get("kind") for name, phase in record["latency"]["phases"].items()}
    phases = {name: value / rows_per_step(record) for name, value in seconds.items()}
    sums = {kind: math.fsum(phases[name] for name in phases if kinds[name] == kind) for kind in KINDS}
    sums = {kind: value for kind, value in sums.items() if kind in kinds.values()}
    return {"total": math.fsum(sums.values()), **sums, **{quantity_of(name): phases[name] for name in phases}}


def quantity_of(phase: str) -> str:
    """Returns the name that the seconds of a phase have among those of kinds and total."""
    return f"phase {phase}" if phase in (*KINDS, "total") else phase


def load_of(interference: Mapping[str, Any]) -> float:
    """Returns the share of the machine's CPU time that others took beside a block."""
    return float((interference.get("other_cpu_share") or 0) + (interference.get("steal_share") or 0))


def _estimate(values: Values) -> dict[str, Any]:
    whole = [value for value in values if value is not None]
    return {"mean_s": math.fsum(whole) / len(whole), "half_width_s": half_width(whole), "block_s": list(values)}


def _work(record: Mapping[str, Any], blocks: Sequence[Block], latency: Mapping[str, Any]) -> dict[str, Any]:
    """The ``work`` of a record. Its floors are at the ceilings of the record, the highest rates of all blocks."""
    work = record["work"] or {}
    phases = work.get("phases") or {}
    floors_s = [block["floors_s"] for block in blocks if block.get("floors_s")]
    if not phases or not all(set(phases) <= set(floors) for floors in floors_s) or not floors_s:
        return dict(work)
    least_s = {name: min(floors[name] for floors in floors_s) for name in phases}
    rates = [rate for read in _CEILINGS if (rate := read(record)) is not None and rate >= 1]
    if len(rates) == len(_CEILINGS):
        # The shortest floor of a block may be longer: each rate may be the highest in another block.
        works = {name: _work_of(phase) for name, phase in phases.items()}
        least_s |= {name: found.floor_s(*rates) for name, found in works.items() if found is not None}
    measured_s = math.fsum(phase["mean_s"] for phase in latency["phases"].values())
    return {
        "phases": {name: {**phase, "floor_s": least_s[name]} for name, phase in phases.items()},
        "floor_fraction": math.fsum(least_s[name] for name in latency["phases"] if name in least_s) / measured_s
        if measured_s
        else None,
    }


def _work_of(phase: Mapping[str, Any]) -> Work | None:
    """The work of a phase in a record; ``None`` where it is not recorded."""
    numbers: list[Any] = [phase.get(name) for name in ("flops", "bytes", "written_bytes")]
    return None if None in numbers else Work(*numbers)
