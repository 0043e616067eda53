"""Records: one JSON object a line, appended and flushed to the disk, read back whole or with one clear sentence."""

from __future__ import annotations

import fcntl
import json
import math
import os
from pathlib import Path
from typing import Any, Self

from rlhfbench.errors import RecordsError, RunFolderError
from rlhfkernels.config.case import Case

Record = dict[str, Any]

SCHEMA = 1
RECORDS_NAME = "records.jsonl"
OUTCOMES = ("ok", "oom", "timeout", "crashed", "invalid", "skipped")

_EMPTY: dict[str, dict[str, Any]] = {
    "memory": {
        "model_bytes": None,
        "activation_bytes": None,
        "rollout_bytes": None,
        "total_bytes": None,
        "peak_phase": None,
        "parts": {},
        "phases": {},
        "views": {
            "ledger_peak_bytes": None,
            "allocator_peak_bytes": None,
            "allocator_reserved_bytes": None,
            "allocator_rest_bytes": None,
            "workspace_bytes": None,
            "driver_peak_bytes": None,
            "host_peak_bytes": None,
        },
    },
    "latency": {
        "inference_s_per_sample": None,
        "update_s_per_sample": None,
        "total_s_per_sample": None,
        "phases": {},
        "stopped_because": None,
    },
    "work": {"phases": {}, "floor_fraction": None},
}
# The keys of a record's ``plan``, as far as its ``memory`` has them too.
_PLAN_KEYS = ("model_bytes", "activation_bytes", "rollout_bytes", "total_bytes", "peak_phase", "parts", "phases")


def make_record(
    case: Case,
    *,
    outcome: str,
    error: dict[str, Any] | None,
    measured: dict[str, Any],
    started_at: str,
    wall_s: float,
    plan: dict[str, Any] | None = None,
) -> Record:
    """A complete record: every key is there, and what was not measured is ``None``.

    Args:
        case: what was asked for.
        outcome: one of ``OUTCOMES``.
        error: ``{"kind", "message", "phase"}``, ``None`` when ``ok``.
        measured: ``memory``, ``latency``, ``work``, ``prompts``, ``engine`` and ``kernels`` (``triton``,
            ``native`` or ``torch``: what ``Options.kernels`` came to; older records lack the key), as far as they are
            known.
        started_at: UTC, ISO 8601.
        wall_s: seconds from asking for the case to its end.
        plan: what ``make_plan`` made; ``None``: nothing was predicted. Older records lack the key.
    """
    assert outcome in OUTCOMES
    sections = {name: _filled(empty, measured.get(name) or {}) for name, empty in _EMPTY.items()}
    return {
        "schema": SCHEMA,
        "case": case.to_dict(),
        "outcome": outcome,
        "error": error,
        **sections,
        "prompts": measured.get("prompts"),
        "engine": measured.get("engine"),
        "kernels": measured.get("kernels"),
        "plan": plan,
        "started_at": started_at,
        "wall_s": wall_s,
    }


def make_plan(memory: dict[str, Any] | None, error: dict[str, Any] | None) -> dict[str, Any]:
    """The ``plan`` object of a record: the memory that was predicted, in the keys and units of ``memory``.

    Args:
        memory: the ``memory`` object of the plan, ``None`` where there is none.
        error: ``{"kind", "message", "phase"}``, why there is none; else ``None``.
    """
    filled = _filled(_EMPTY["memory"], memory or {})
    return {**{key: filled[key] for key in _PLAN_KEYS}, "error": error}


def _filled(empty: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """``given``, with the keys of ``empty`` that it lacks."""
    merged = {**empty, **given}
    return {
        key: _filled(empty[key], value) if isinstance(empty.get(key), dict) and isinstance(value, dict) else value
        for key, value in merged.items()
    }


def read_records(path: str | Path) -> list[Record]:
    """The records of a run folder or of a records file, in the order in which they were made.

    A last line without its end was being written when the harness died, and is left out.

    Raises:
        RecordsError: there is no such file, a line is malformed or comes from a newer rlhfbench.
    """
    path = Path(path)
    if path.is_dir():
        path /= RECORDS_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordsError(f"records file '{path}' cannot be read: {error.strerror}.") from error
    lines = data[: _whole_bytes(data)].splitlines()
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _whole_bytes(data: bytes) -> int:
    """How much of ``data`` is whole lines."""
    return data.rfind(b"\n") + 1


def _parse(path: Path, number: int, line: bytes) -> Record:
    where = f"records file '{path}', line {number}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise RecordsError(f"{where}: it is not JSON.") from error
    if not isinstance(record, dict) or not isinstance(record.get("schema"), int):
        raise RecordsError(f"{where}: it is not a record (an object with a schema number).")
    if record["schema"] > SCHEMA:
        raise RecordsError(
            f"{where}: its schema is {record['schema']} and this rlhfbench reads up to {SCHEMA}: a newer one wrote it."
        )
    if not isinstance(record.get("case"), dict) or "id" not in record["case"] or record.get("outcome") not in OUTCOMES:
        raise RecordsError(f"{where}: it is not a record (it lacks a case with an id, or a known outcome).")
    return record


class RecordsFile:
    """A run's records, open for appending by this process alone.

    Attributes:
        records: what the file holds, the records of an earlier start of the same run first.

    Raises:
        RunFolderError: another process is writing this run, or the file cannot be written.
        RecordsError: what the file holds cannot be read.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / RECORDS_NAME
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise RunFolderError(f"out '{run_dir}' cannot be written: {error.strerror}.") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.records = read_records(self.path)
            os.ftruncate(self._fd, _whole_bytes(self.path.read_bytes()))
        except BlockingIOError:
            os.close(self._fd)
            raise RunFolderError(f"out '{run_dir}' is in use: another rlhfbench is running in it.") from None
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def append(self, record: Record) -> None:
        """Writes ``record`` and returns when the disk has it.

        Raises:
            RecordsError: it could not be written; the file holds what it held before.
        """
        line = json.dumps(_finite(record), allow_nan=False).encode() + b"\n"
        size = os.fstat(self._fd).st_size
        try:
            rest = line
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, size)
            raise RecordsError(f"records file '{self.path}' cannot be written: {error.strerror}.") from error
        self.records.append(record)


def _finite(value: Any) -> Any:
    """``value`` with every number that JSON cannot hold made ``None``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
