"""Types of a record that was read from a file: the first value that breaks the schema."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rlhfbench.records.derived import at
from rlhfbench.records.schema import FIELDS, PHASE_FIELDS
from rlhfkernels.config.rules import shown

_CASE_ID = re.compile(r"[\w-]{1,64}")
_MAX_FLOAT = 1e300  # sums and products of them are finite or infinite, and never an error
_RULES = {
    "string": "a text",
    "Int64": "an integer of at most 64 bits",
    "Float64": "a finite number",
    "map": "an object",
    "list": "a list of finite numbers",
}
# Of the keys that a phase has in any section. One of them has no column.
_PHASE_DTYPES = {**{str(row.source).rpartition(".")[2]: row.dtype for row in PHASE_FIELDS}, "written_bytes": "Int64"}


def wrong_type(record: Mapping[str, Any]) -> str | None:
    """One sentence that names the first field of ``record`` whose type is wrong; ``None`` if all are right."""
    for row in FIELDS:
        if isinstance(row.source, str):
            problem = _wrong_value(record, row.source, row.dtype)
            if problem is not None:
                return problem
    case_id = at(record, "case.id")
    if not _CASE_ID.fullmatch(case_id or ""):
        return f"case.id is {shown(case_id)}: it must be letters, digits, _ and -."
    for section in ("latency", "memory", "work", "plan"):
        for name, phase in (at(record, f"{section}.phases") or {}).items():
            where = f"{section}.phases.{name}"
            if not isinstance(phase, Mapping):
                return f"{where} is {shown(phase)}: it must be an object."
            for key, dtype in _PHASE_DTYPES.items():
                if not fits(phase.get(key), dtype):
                    return f"{where}.{key} is {shown(phase[key])}: it must be {_RULES[dtype]}."
    groups = at(record, "case.options") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        return f"case.options is {shown(groups)}: it must be objects by group."
    stage = at(record, "case.options.parallel.zero_stage")  # its column is derived
    if not fits(stage, "Int64"):
        return f"case.options.parallel.zero_stage is {shown(stage)}: it must be {_RULES['Int64']}."
    for path in ("latency.sequences_per_sample", "case.options.parallel.world_size"):  # seconds are divided by them
        number = at(record, path)
        if number is not None and number < 1:
            return f"{path} is {shown(number)}: it must be an integer of at least 1."
    num_rows = at(record, "case.batch_size")
    if at(record, "latency.phases") and (num_rows is None or num_rows < 1):  # seconds per sample divide by it
        return f"case.batch_size is {shown(num_rows)}: it must be an integer of at least 1 in a timed record."
    return None


def _wrong_value(record: Mapping[str, Any], path: str, dtype: str) -> str | None:
    """One sentence if the value at ``path`` has another type than ``dtype``, or what it is in is no object."""
    node: Any = record
    keys = path.split(".")
    for place, key in enumerate(keys):
        if node is None:
            return None
        if not isinstance(node, Mapping):
            # ``error`` is an object with a column ``error.kind``; ``engine`` may be one or a text.
            return f"{'.'.join(keys[:place])} is {shown(node)}: it must be an object."
        node = node.get(key)
    return None if fits(node, dtype) else f"{path} is {shown(node)}: it must be {_RULES[dtype]}."


def fits(value: Any, dtype: str) -> bool:
    """True if ``value`` is a value of ``dtype``, as in ``Field``, or absent."""
    if value is None or dtype == "object":
        return True
    if dtype == "map":
        return isinstance(value, Mapping)
    if dtype == "list":
        return isinstance(value, list) and all(fits(item, "Float64") for item in value)
    if dtype == "string":
        return isinstance(value, str)
    if isinstance(value, bool):
        return False
    if dtype == "Int64":
        return isinstance(value, int) and abs(value) < 2**63
    return isinstance(value, (int, float)) and abs(value) < _MAX_FLOAT
