"""Profiles of a run: what ``run --profile`` leaves in ``traces/<case id>/profile.json``, as data frames."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfbench.errors import RecordsError
from rlhfbench.measure.options import PROFILE_NAME
from rlhfbench.records.json_files import are_columns, are_rows, frame_of, is_row, read_json, rows_of

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
    profile = read_json(path, "profile")
    if profile is None:
        return None
    if not _is_profile(profile):
        raise RecordsError(f"profile '{path}' holds no profile (phases with their ops and stacks).")
    return dict(profile)


def _is_profile(profile: Any) -> bool:
    if not isinstance(profile, dict) or not isinstance(profile.get("phases"), list):
        return False
    if profile.get("allocator") is not None and not are_columns(profile["allocator"], _ALLOCATOR):
        return False
    return all(
        isinstance(phase, dict)
        and is_row(phase, _PHASES)
        and phase.get("phase") is not None
        and Path(phase.get("trace") or "").name == (phase.get("trace") or "")  # a file beside the profile
        and all(are_rows(phase.get(key), dtypes) for key, dtypes in (("ops", _OPS), ("kernels", _KERNELS)))
        and (phase.get("stacks") is None or _are_stacks(phase["stacks"]))
        for phase in profile["phases"]
    )


def _are_stacks(stacks: Any) -> bool:
    """Columns in which every parent comes before its children."""
    return are_columns(stacks, _STACKS) and all(-1 <= parent < row for row, parent in enumerate(stacks["parent"]))


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
    calls = [
        {"phase": phase["phase"], "row": row, **call}
        for phase in phases
        for row, call in enumerate(rows_of(phase.get("stacks"), _STACKS))
    ]
    return {
        "phases": frame_of(phases, _PHASES),
        "ops": frame_of(
            [{"phase": p["phase"], **row} for p in phases for row in p["ops"]], {"phase": "string", **_OPS}
        ),
        "kernels": frame_of(
            [{"phase": p["phase"], **row} for p in phases for row in p["kernels"]], {"phase": "string", **_KERNELS}
        ),
        "stacks": frame_of(calls, {"phase": "string", "row": "Int64", **_STACKS}),
        "allocator": frame_of(rows_of(profile.get("allocator"), _ALLOCATOR), _ALLOCATOR),
    }
