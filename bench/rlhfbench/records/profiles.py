"""Profiles of a run: what ``run --profile`` leaves in ``traces/<case id>/profile.json``, as data frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfbench.errors import RecordsError
from rlhfbench.measure.options import PROFILE_NAME
from rlhfbench.records.schema import fits

if TYPE_CHECKING:
    import pandas as pd

Profile = dict[str, Any]

# The columns of the frames, each with the key in the file and its dtype.
_PHASES = {"phase": "string", "trace": "string", "wall_s": "Float64", "outside_s": "Float64", "num_ops": "Int64"}
_OPS = {"name": "string", "kind": "string", "count": "Int64", "self_s": "Float64", "device_s": "Float64"}
_KERNELS = {"name": "string", "count": "Int64", "device_s": "Float64"}
_STACKS = {
    "name": "string",
    "kind": "string",
    "parent": "Int64",
    "total_s": "Float64",
    "device_s": "Float64",
    "count": "Int64",
}
_ALLOCATOR = {"s": "Float64", "active_bytes": "Int64", "reserved_bytes": "Int64"}


def read_profile(traces_dir: Path, case_id: str) -> Profile | None:
    """Returns the profile of a case, ``None`` if it has none.

    Raises:
        RecordsError: the file cannot be read or holds no profile.
    """
    path = traces_dir / case_id / PROFILE_NAME
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecordsError(f"profile '{path}' cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise RecordsError(f"profile '{path}' is not JSON.") from error
    if not _is_profile(profile):
        raise RecordsError(f"profile '{path}' holds no profile (phases with their ops and stacks).")
    return dict(profile)


def _is_profile(profile: Any) -> bool:
    if not isinstance(profile, dict) or not isinstance(profile.get("phases"), list):
        return False
    if profile.get("allocator") is not None and not _are_columns(profile["allocator"], _ALLOCATOR):
        return False
    return all(
        isinstance(phase, dict)
        and _is_row(phase, _PHASES)
        and phase.get("phase") is not None
        and Path(phase.get("trace") or "").name == (phase.get("trace") or "")  # a file beside the profile
        and all(_are_rows(phase.get(key), dtypes) for key, dtypes in (("ops", _OPS), ("kernels", _KERNELS)))
        and (phase.get("stacks") is None or _are_stacks(phase["stacks"]))
        for phase in profile["phases"]
    )


def _is_row(row: Any, dtypes: dict[str, str]) -> bool:
    return isinstance(row, dict) and all(fits(row.get(key), dtype) for key, dtype in dtypes.items())


def _are_rows(rows: Any, dtypes: dict[str, str]) -> bool:
    return isinstance(rows, list) and all(_is_row(row, dtypes) for row in rows)


def _are_columns(columns: Any, dtypes: dict[str, str]) -> bool:
    if not isinstance(columns, dict) or not all(isinstance(columns.get(key), list) for key in dtypes):
        return False
    same_length = len({len(columns[key]) for key in dtypes}) == 1
    return same_length and all(
        value is not None and fits(value, dtype) for key, dtype in dtypes.items() for value in columns[key]
    )


def _are_stacks(stacks: Any) -> bool:
    """Columns in which every parent comes before its children."""
    return _are_columns(stacks, _STACKS) and all(-1 <= parent < row for row, parent in enumerate(stacks["parent"]))


def profile_frames(profile: Profile) -> dict[str, pd.DataFrame]:
    """The frames of a profile for ``rlhfreports.profiles``.

    Args:
        profile: As ``read_profile`` returns it.

    Returns:
        ``phases``: A row a phase, with ``phase``, ``trace`` (the file beside the profile), ``wall_s`` (of its first
        stretch under the profiler), ``outside_s`` (of these in no op) and ``num_ops``.
        ``ops``: A row an op, with ``phase``, ``name``, ``kind``, ``count``, ``self_s`` and ``device_s``.
        ``kernels``: The same of CUDA kernels, without ``kind`` and ``self_s``.
        ``stacks``: A row a call, parents first, with ``phase``, ``row``, ``name``, ``kind``, ``parent`` (a row of the
        phase, -1 for a root), ``total_s``, ``device_s`` and ``count``.
        ``allocator``: ``s``, ``active_bytes`` and ``reserved_bytes``; empty on a CPU.
    """
    phases = profile["phases"]
    stacks = [(phase["phase"], phase["stacks"]) for phase in phases if phase["stacks"] is not None]
    calls = [
        {"phase": name, "row": row, **{key: columns[key][row] for key in _STACKS}}
        for name, columns in stacks
        for row in range(len(columns["name"]))
    ]
    allocator = profile.get("allocator") or {key: [] for key in _ALLOCATOR}
    curve = [
        dict(zip(_ALLOCATOR, row, strict=True)) for row in zip(*(allocator[key] for key in _ALLOCATOR), strict=True)
    ]
    return {
        "phases": _frame(phases, _PHASES),
        "ops": _frame([{"phase": p["phase"], **row} for p in phases for row in p["ops"]], {"phase": "string", **_OPS}),
        "kernels": _frame(
            [{"phase": p["phase"], **row} for p in phases for row in p["kernels"]], {"phase": "string", **_KERNELS}
        ),
        "stacks": _frame(calls, {"phase": "string", "row": "Int64", **_STACKS}),
        "allocator": _frame(curve, _ALLOCATOR),
    }


def _frame(rows: list[dict[str, Any]], dtypes: dict[str, str]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        {key: pd.array([row.get(key) for row in rows], dtype=dtype) for key, dtype in dtypes.items()}  # type: ignore[call-overload]
    )
