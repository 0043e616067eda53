"""Records to a data frame: one row per record, nullable dtypes, NA for absent numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from rlhfbench.measure.interference import disturbance
from rlhfbench.records.blocks import block_values
from rlhfbench.records.derived import at
from rlhfbench.records.schema import columns


def records_frame(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Returns the data frame of ``records``, which every report takes.

    Args:
        records: records as ``read_records`` returns them. Absent objects give NA.

    Returns:
        One row per record, in their order, with the columns of ``rlhfbench.records.schema``.
    """
    phases = dict.fromkeys(
        phase
        for record in records
        for section in ("latency", "memory")
        for phase in at(record, f"{section}.phases") or {}
    )
    return pd.DataFrame(
        {
            name: _column([field.value(record) for record in records], field.dtype)
            for name, field in columns(phases).items()
        }
    )


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
