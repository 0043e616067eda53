"""Records to a data frame: one row per record, nullable dtypes, NA for absent numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from rlhfbench.records.schema import at, columns


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
