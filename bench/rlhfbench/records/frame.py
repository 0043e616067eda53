"""Records to a data frame: one row per record, nullable dtypes, NA for absent numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from rlhfbench.measure.interference import disturbance
from rlhfbench.records.blocks import block_values
from rlhfbench.records.checks import fits
from rlhfbench.records.derived import at
from rlhfbench.records.schema import columns
from rlhfkernels.observer import PARTS


def records_frame(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Returns the data frame of ``records``, which every report takes.

    Args:
        records: records as ``read_records`` returns them. Absent objects give NA.

    Returns:
        One row per record, in their order, with the columns of ``rlhfbench.records.schema``.
    """
    phases = _phases_in_order(records)
    return pd.DataFrame(
        {
            name: _column([field.value(record) for record in records], field.dtype)
            for name, field in columns(phases).items()
        }
    )


def _phases_in_order(records: Sequence[dict[str, Any]]) -> list[str]:
    """The phases of all records, each before those that it precedes in its own record."""
    found: list[str] = []
    for record in records:
        for section in ("latency", "memory"):
            place = len(found)
            for phase in reversed(at(record, f"{section}.phases") or {}):
                if phase in found:
                    place = found.index(phase)
                else:
                    found.insert(place, phase)
    return found


def _column(values: list[Any], dtype: str) -> Any:
    if dtype == "list":
        return pd.Series(values, dtype="object")
    return pd.array(values, dtype=dtype)  # type: ignore[call-overload]


# The columns of a frame of blocks.
BLOCK_COLUMNS = {
    "case_id": "string",
    "block": "Int64",
    "started_at": "string",
    "total_s_per_sample": "Float64",
    "other_cpu_share": "Float64",
    "steal_share": "Float64",
    "waiting_share": "Float64",
    "cpu_mhz": "Float64",
    "disturbed_by": "string",
    "error": "string",
}


def blocks_frame(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Returns one row per block of ``records``, in their order, with the columns of ``BLOCK_COLUMNS``.

    Args:
        records: records as ``read_records`` returns them. Those of schema 1 have no blocks.
    """
    rows = [row for record in records for row in _block_rows(record)]
    return pd.DataFrame(
        {
            name: pd.array([row.get(name) for row in rows], dtype=dtype)  # type: ignore[call-overload]
            for name, dtype in BLOCK_COLUMNS.items()
        }
    )


def _block_rows(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    blocks = at(record, "latency.blocks") or []
    values = block_values(record) if blocks else []
    for number, (block, seconds) in enumerate(zip(blocks, values, strict=True)):
        interference = block.get("interference") or {}
        yield {
            "case_id": at(record, "case.id"),
            "block": number,
            "started_at": block.get("started_at"),
            "total_s_per_sample": seconds["total"] if seconds else None,
            **{name: interference.get(name) for name in ("other_cpu_share", "steal_share", "waiting_share", "cpu_mhz")},
            "disturbed_by": disturbance(interference),
            "error": at(block, "error.message"),
        }


# The columns of a frame of ranks.
RANK_COLUMNS = {
    "case_id": "string",
    "rank": "Int64",
    "host": "string",
    "device": "string",
    "total_bytes": "Int64",
    **{f"{part}_part_bytes": "Int64" for part in PARTS},
    "communication_step_s": "Float64",
    "waiting_s": "Float64",
}


def ranks_frame(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Returns one row per rank of ``records``, in their order, with the columns of ``RANK_COLUMNS``.

    Seconds are those of the step in which collectives were counted, over all phases.

    Args:
        records: records as ``read_records`` returns them. Those of one process have no ranks.
    """
    rows = [row for record in records for row in _rank_rows(record)]
    return pd.DataFrame(
        {
            name: pd.array(  # type: ignore[call-overload]
                [row[name] if fits(row[name], dtype) else None for row in rows], dtype=dtype
            )
            for name, dtype in RANK_COLUMNS.items()
        }
    )


def _rank_rows(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    ranks = at(record, "world.ranks")
    for rank in ranks if isinstance(ranks, list) else []:
        phases = at(rank, "phases")
        yield {
            "case_id": at(record, "case.id"),
            **{name: at(rank, name) for name in ("rank", "host", "device", "total_bytes")},
            **{f"{part}_part_bytes": at(rank, f"parts.{part}") for part in PARTS},
            **{name: _sum(phases, name) for name in ("communication_step_s", "waiting_s")},
        }


def _sum(phases: Any, name: str) -> float | None:
    """The sum of a number over phases, ``None`` where a phase lacks it."""
    values = [at(phase, name) for phase in phases.values()] if isinstance(phases, Mapping) else []
    return math.fsum(values) if values and all(v is not None and fits(v, "Float64") for v in values) else None
