"""JSON files beside the records: read with one sentence for what is wrong, checked, and turned into frames."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfbench.errors import RecordsError
from rlhfbench.records.checks import fits

if TYPE_CHECKING:
    import pandas as pd

Dtypes = Mapping[str, str]  # of columns, by their key


def read_json(path: Path, what: str) -> Any:
    """Returns what ``path`` holds, ``None`` if there is no such file.

    Args:
        path: of the file.
        what: the word for it in a message.

    Raises:
        RecordsError: the file cannot be read or is not JSON, or holds nothing.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecordsError(f"{what} '{path}' cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise RecordsError(f"{what} '{path}' is not JSON.") from error
    if found is None:
        raise RecordsError(f"{what} '{path}' holds nothing.")
    return found


def finite(value: Any) -> Any:
    """``value`` with ``None`` for NaN and infinities, which JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def is_row(row: Any, dtypes: Dtypes) -> bool:
    """True for an object whose values fit ``dtypes`` or are absent."""
    return isinstance(row, dict) and all(fits(row.get(key), dtype) for key, dtype in dtypes.items())


def are_rows(rows: Any, dtypes: Dtypes) -> bool:
    """True for a list of such objects."""
    return isinstance(rows, list) and all(is_row(row, dtypes) for row in rows)


def are_columns(columns: Any, dtypes: Dtypes, *, optional: Sequence[str] = ()) -> bool:
    """True for an object of lists of one length, with values that fit ``dtypes``; only ``optional`` ones have gaps."""
    if not isinstance(columns, dict) or not all(isinstance(columns.get(key), list) for key in dtypes):
        return False
    same_length = len({len(columns[key]) for key in dtypes}) <= 1
    return same_length and all(
        fits(value, dtype) and (value is not None or key in optional)
        for key, dtype in dtypes.items()
        for value in columns[key]
    )


def rows_of(columns: Mapping[str, Sequence[Any]] | None, dtypes: Dtypes) -> list[dict[str, Any]]:
    """The rows of ``columns``; none where there are no columns."""
    if columns is None:
        return []
    return [dict(zip(dtypes, row, strict=True)) for row in zip(*(columns[key] for key in dtypes), strict=True)]


def frame_of(rows: Sequence[Mapping[str, Any]], dtypes: Dtypes) -> pd.DataFrame:
    """A frame with a column for each of ``dtypes``, NA where a row lacks it."""
    import pandas as pd

    return pd.DataFrame(
        {key: pd.array([row.get(key) for row in rows], dtype=dtype) for key, dtype in dtypes.items()}  # type: ignore[call-overload]
    )
