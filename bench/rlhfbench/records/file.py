"""The file of records: one JSON object per line, each flushed to the disk before the next case starts.

A line is a record, or a later block of a record above it. ``read_records`` returns whole records.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from rlhfbench.errors import RecordsError, RunFolderError
from rlhfbench.records.blocks import Block, summarize, wrong_block
from rlhfbench.records.checks import wrong_type
from rlhfbench.records.derived import at
from rlhfbench.records.json_files import finite
from rlhfbench.records.schema import OUTCOMES, SCHEMA, empty_plan, empty_record, filled
from rlhfbench.records.upgrades import upgraded
from rlhfkernels.config.case import Case
from rlhfkernels.config.rules import shown

Record = dict[str, Any]

RECORDS_NAME = "records.jsonl"
_KEYS, _LATENCY_KEYS = empty_record().keys(), empty_record()["latency"].keys()


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
    """A complete record: every key is present, and what was not measured is ``None``.

    Args:
        case: the case.
        outcome: one of ``OUTCOMES``.
        error: ``{"kind", "message", "phase"}``, ``None`` when ``ok``.
        measured: ``memory``, ``latency``, ``work``, ``stats``, ``world``, ``prompts``, ``engine``, ``kernels`` and
            ``num_threads``, as far as they are known, and the first ``block``. Other keys are not kept.
        started_at: UTC, ISO 8601.
        wall_s: seconds from the request to the end of the case.
        plan: the result of ``make_plan``, ``None`` when nothing was predicted.
    """
    assert outcome in OUTCOMES
    empty = empty_record()
    known = {name: value for name, value in measured.items() if name in empty and value is not None}
    if "latency" in known:
        blocks = [measured["block"]] if "block" in measured else []
        known["latency"] = {"sequences_per_sample": case.sequences_per_row, **known["latency"], "blocks": blocks}
    about = {"outcome": outcome, "error": error, "plan": plan, "started_at": started_at, "wall_s": wall_s}
    return summarize({"schema": SCHEMA, "case": case.to_dict(), **filled(empty, {**known, **about})})


def make_plan(memory: dict[str, Any] | None, error: dict[str, Any] | None) -> dict[str, Any]:
    """The ``plan`` object of a record: predicted memory, in the keys and units of ``memory``.

    Args:
        memory: the ``memory`` object of a plan, ``None`` when the prediction failed.
        error: ``{"kind", "message", "phase"}`` of a failed prediction, else ``None``.
    """
    empty = empty_plan()
    known = {key: value for key, value in (memory or {}).items() if key in empty}
    return {**filled(empty, known), "error": error}


def read_records(path: str | Path) -> list[Record]:
    """Returns the records of a run folder or of a records file, oldest first, in the present schema.

    Of a case that a run tried again, only the newest record is returned. A last line without a newline was cut off
    when the harness died, and is dropped.

    Raises:
        RecordsError: the file cannot be read, or a line is malformed or of a newer rlhfbench.
    """
    path = Path(path)
    if path.is_dir():
        path /= RECORDS_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordsError(f"records file '{path}' cannot be read: {error.strerror}.") from error
    lines = data[: _whole_bytes(data)].splitlines()
    return _newest(path, (_parse(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()))


def _newest(path: Path, entries: Iterable[Record]) -> list[Record]:
    """Records with their later blocks, without those that a later one of the same case and run replaces.

    Records of older versions name no run. One of a run replaces them; among themselves they are all kept, since they
    may come from several runs.

    Args:
        path: of the file that they are read from.
        entries: Records, and blocks ``{"block_of", "run", "block"}``, oldest first. A block of no record is dropped:
            its record was replaced in a run that was tried again.
    """
    kept: dict[int, Record] = {}
    places: dict[str, dict[int, str | None]] = {}  # by case: places in kept, with the run of each
    for number, record in enumerate(entries):
        if "block_of" in record:
            _add_block(path, kept, places.get(record["block_of"], {}), record)
            continue
        case_id, run_id = str(record["case"]["id"]), at(record, "run.id")
        own = places.setdefault(case_id, {})
        for place in [place for place, run in own.items() if run_id is not None and run in (None, run_id)]:
            del kept[place], own[place]
        kept[number], own[number] = record, run_id
    return [summarize(record) for record in kept.values()]


def _add_block(path: Path, kept: dict[int, Record], places: Mapping[int, str | None], entry: Record) -> None:
    """Adds the block of ``entry`` to its record, which is replaced by a copy.

    Args:
        path: of the file.
        kept: the records by their places.
        places: those of the records of its case, with the run of each.
        entry: the block.
    """
    for place in sorted(places, reverse=True):
        if places[place] == at(entry, "run.id"):
            latency = kept[place]["latency"]
            _check_phases(path, entry["block_of"], entry["block"], latency["phases"] or ())
            blocks = [*(latency["blocks"] or ()), entry["block"]]
            asked = max(latency["num_blocks"] or 0, len(blocks))  # a resumed run may ask for more
            kept[place] = {**kept[place], "latency": {**latency, "num_blocks": asked, "blocks": blocks}}
            return


def _check_phases(path: Path, case_id: str, block: Block, phases: Collection[str]) -> None:
    if block.get("error") is None and set(block["phases"]) != set(phases):
        raise RecordsError(f"records file '{path}': a block of case {case_id} has other phases than its record.")


def _whole_bytes(data: bytes) -> int:
    """Length of ``data`` up to its last newline."""
    return data.rfind(b"\n") + 1


def _parse(path: Path, number: int, line: bytes) -> Record:
    where = f"records file '{path}', line {number}"
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RecordsError(f"{where}: it contains a lone surrogate, which is not valid text.") from error
    except (ValueError, RecursionError) as error:
        raise RecordsError(f"{where}: it is not JSON.") from error
    if not isinstance(record, dict) or not isinstance(record.get("schema"), int):
        raise RecordsError(f"{where}: it is not a record (an object with a schema number).")
    if record["schema"] > SCHEMA:
        raise RecordsError(
            f"{where}: its schema is {record['schema']}, of a newer rlhfbench: this one reads up to schema {SCHEMA}."
        )
    if "block_of" in record:
        return _checked_block(where, record)
    if not isinstance(record.get("case"), dict) or "id" not in record["case"] or record.get("outcome") not in OUTCOMES:
        raise RecordsError(f"{where}: it is not a record (it lacks a case with an id, or a known outcome).")
    try:
        record = _whole(upgraded(record))
    except (TypeError, AttributeError, ValueError, KeyError) as error:
        raise RecordsError(f"{where}: it is not a record of schema {record['schema']}.") from error
    problem = wrong_type(record)
    blocks = () if problem else record["latency"].get("blocks") or ()
    if not isinstance(blocks, (list, tuple)):
        problem, blocks = f"latency.blocks is {shown(blocks)}: it must be a list of blocks.", ()
    for number, block in enumerate(blocks):
        fault = wrong_block(block, record["latency"].get("phases") or {})
        problem = problem or (fault and f"latency.blocks.{number}: {fault}")
    if problem:
        raise RecordsError(f"{where}: {problem}")
    return record


def _whole(record: Record) -> Record:
    """``record`` with every key, where an object that others read is absent."""
    if isinstance(record.get("latency"), dict) and record.keys() >= _KEYS and record["latency"].keys() >= _LATENCY_KEYS:
        return record
    return filled(empty_record(), {key: value for key, value in record.items() if value is not None})


def _checked_block(where: str, entry: Record) -> Record:
    """``entry`` if it is a block that was timed after its record was written."""
    if not isinstance(entry["block_of"], str):
        raise RecordsError(f"{where}: block_of is {shown(entry['block_of'])}: it must be the id of a case.")
    block = entry.get("block")
    problem = wrong_block(block, (block.get("phases") or ()) if isinstance(block, dict) else ())
    if problem is not None:
        raise RecordsError(f"{where}: block: {problem}")
    return entry


@dataclasses.dataclass(kw_only=True, slots=True)
class Entry:
    """The part of a record that a run keeps in memory. The record stays on the disk: 10,000 records would take 0.4 GB.

    Attributes:
        case_id: id of its case.
        outcome: one of ``OUTCOMES``.
        run: the ``run`` object of the record.
        num_blocks: blocks that are recorded.
        num_blocks_asked: blocks that the case is timed in; 0 where none are.
        phases: names of its phases.
        oom_case: the case, if it was out of memory.
    """

    case_id: str
    outcome: str
    run: dict[str, Any] | None
    num_blocks: int
    num_blocks_asked: int
    phases: frozenset[str]
    oom_case: dict[str, Any] | None

    @classmethod
    def of(cls, record: Record) -> Self:
        """The entry of ``record``."""
        latency = record["latency"]
        return cls(
            case_id=record["case"]["id"],
            outcome=record["outcome"],
            run=record["run"],
            num_blocks=len(latency["blocks"] or ()),
            num_blocks_asked=latency["num_blocks"] or 0,
            phases=frozenset(latency["phases"] or ()),
            oom_case=record["case"] if record["outcome"] == "oom" else None,
        )

    @property
    def host(self) -> str | None:
        """Name of the machine that ran the case."""
        return None if self.run is None else self.run.get("host")


class RecordsFile:
    """The records of a run, open for appending and locked by this process.

    Attributes:
        entries: what is known of each recorded case without reading the file, by the case's id. Those of earlier
            starts of the run come first.

    Raises:
        RunFolderError: another process writes this run, or the file cannot be written.
        RecordsError: the file cannot be read.
    """

    def __init__(self, run_dir: Path) -> None:
        import fcntl  # here, as Windows has none and can still read records

        self.path = run_dir / RECORDS_NAME
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise RunFolderError(f"out '{run_dir}' cannot be written: {error.strerror}.") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.entries = {str(record["case"]["id"]): Entry.of(record) for record in read_records(self.path)}
            os.ftruncate(self._fd, _whole_bytes(self.path.read_bytes()))
        except BlockingIOError:
            os.close(self._fd)
            raise RunFolderError(f"out '{run_dir}' is in use: another rlhfbench is running in it.") from None
        except OSError as error:
            os.close(self._fd)
            raise RunFolderError(f"out '{run_dir}' cannot be locked or read: {error.strerror}.") from error
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    @property
    def records(self) -> list[Record]:
        """The records of the file, read from it: those of earlier starts of the run first."""
        return read_records(self.path)

    @property
    def measured(self) -> list[Entry]:
        """The entries of cases that are ok."""
        return [entry for entry in self.entries.values() if entry.outcome == "ok"]

    def append(self, record: Record) -> None:
        """Writes ``record`` and returns when the disk has it.

        Raises:
            RecordsError: the write failed; the file is as it was before.
        """
        self._write(record)
        self.entries.pop(record["case"]["id"], None)  # a case that is tried again moves to the end, as in the file
        self.entries[record["case"]["id"]] = Entry.of(record)

    def append_block(self, case_id: str, block: Block) -> None:
        """Writes a later ``block`` of a recorded case, and returns when the disk has it.

        Raises:
            RecordsError: the block has other phases than its record, or the write failed; the file is as it was before.
        """
        entry = self.entries[case_id]
        _check_phases(self.path, case_id, block, entry.phases)
        self._write({"schema": SCHEMA, "block_of": case_id, "run": entry.run, "block": block})
        entry.num_blocks += 1

    def _write(self, entry: Record) -> None:
        line = json.dumps(finite(entry), allow_nan=False).encode() + b"\n"
        status = os.fstat(self._fd)
        if status.st_nlink == 0:
            raise RecordsError(f"records file '{self.path}' cannot be written: it was removed.")
        size = status.st_size
        try:
            rest = line
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, size)
            raise RecordsError(f"records file '{self.path}' cannot be written: {error.strerror}.") from error
