"""Records in, the table that reports take out: one row per record, nullable types, absent numbers NA and never 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from rlhfbench.cases.settings import changed_options, setting_of
from rlhfkernels.config.settings import SETTINGS
from rlhfkernels.methods.table import METHODS
from rlhfreports.columns import COLUMNS, PARTS, PHASE_COLUMNS

_CASE_FIELDS = (
    "method",
    "model",
    "prompt_len",
    "completion_len",
    "batch_size",
    "device",
    "dtype",
    "seed",
)
_MEMORY_FIELDS = ("model_bytes", "activation_bytes", "rollout_bytes", "total_bytes", "peak_phase")
_VIEW_FIELDS = (
    "ledger_peak_bytes",
    "allocator_peak_bytes",
    "allocator_reserved_bytes",
    "allocator_rest_bytes",
    "workspace_bytes",
    "driver_peak_bytes",
    "host_peak_bytes",
)
_LATENCY_FIELDS = ("inference_s_per_sample", "update_s_per_sample", "total_s_per_sample", "stopped_because")
_METHOD_ORDER = {name: place for place, name in enumerate(METHODS)}
_SETTING_ORDER = {name: place for place, name in enumerate(SETTINGS)}


def records_frame(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The table of ``records``, in their order.

    Args:
        records: records as ``records.jsonl`` has them. Objects that are ``null`` or missing give NA in their columns.

    Returns:
        A table with ``rlhfreports.columns.COLUMNS`` and, for every phase that occurs, ``PHASE_COLUMNS``.
    """
    rows = [_row(record) for record in records]
    phases = list(dict.fromkeys(phase for record in records for phase in _phases(record)))
    dtypes = {column.name: column.dtype for column in COLUMNS}
    for phase in phases:
        dtypes |= {column.name.format(phase=phase): column.dtype for column in PHASE_COLUMNS}
    columns = {name: pd.array([row.get(name) for row in rows], dtype=dtype) for name, dtype in dtypes.items()}
    return pd.DataFrame(columns)


def _row(record: dict[str, Any]) -> dict[str, Any]:
    case = _object(record, "case")
    error = _object(record, "error")
    memory = _object(record, "memory")
    latency = _object(record, "latency")
    plan = _object(record, "plan")
    row: dict[str, Any] = {name: case.get(name) for name in _CASE_FIELDS}
    row |= _named(case)
    row |= {"outcome": record.get("outcome"), "started_at": record.get("started_at"), "wall_s": record.get("wall_s")}
    row |= {"error_kind": error.get("kind"), "error": error.get("message"), "error_phase": error.get("phase")}
    row |= {name: memory.get(name) for name in _MEMORY_FIELDS}
    row |= {name: _object(memory, "views").get(name) for name in _VIEW_FIELDS}
    row |= {f"{part}_part_bytes": _object(memory, "parts").get(part) for part in PARTS}
    row |= {f"predicted_{name}": plan.get(name) for name in _MEMORY_FIELDS}
    row["plan_error"] = _object(plan, "error").get("message")
    row |= {name: latency.get(name) for name in _LATENCY_FIELDS}
    row["floor_fraction"] = _object(record, "work").get("floor_fraction")
    row["num_prompts_truncated"] = _object(record, "prompts").get("num_truncated")
    return row | _phase_cells(memory, latency)


def _named(case: dict[str, Any]) -> dict[str, Any]:
    """The cells that follow from the case and are not fields of it."""
    method = case.get("method", "")
    lengths = [case.get("prompt_len"), case.get("completion_len")]
    options = _object(case, "options")
    setting = setting_of(options)
    return {
        "case_id": case.get("id"),
        "method_title": METHODS[method].title if method in METHODS else method,
        "method_order": _METHOD_ORDER.get(method),
        "seq_len": None if None in lengths else sum(lengths),
        "setting": setting,
        "setting_order": _SETTING_ORDER.get(setting),
        "lora_rank": _object(options, "lora").get("r"),
        "options": options_text(options),
    }


def options_text(options: dict[str, Any]) -> str:
    """The options that are not as their setting has them, as ``name=value`` joined by commas."""
    return ", ".join(f"{name}={value}" for name, value in changed_options(options).items())


def _phase_cells(memory: dict[str, Any], latency: dict[str, Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for phase, found in _object(memory, "phases").items():
        cells[f"{phase}_phase_peak_bytes"] = found.get("total_bytes")
    num_steps = []
    for phase, found in _object(latency, "phases").items():
        cells[f"{phase}_phase_median_s"] = found.get("median_s")
        num_steps.append(len(found.get("samples_s") or ()))
    cells["num_timed_steps"] = max(num_steps, default=None)
    return cells


def _phases(record: dict[str, Any]) -> list[str]:
    return [*_object(_object(record, "latency"), "phases"), *_object(_object(record, "memory"), "phases")]


def _object(record: dict[str, Any], name: str) -> dict[str, Any]:
    """The object ``name`` of ``record``; empty where it is ``null`` or missing."""
    found = record.get(name)
    return found if isinstance(found, dict) else {}
