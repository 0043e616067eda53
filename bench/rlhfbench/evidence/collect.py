"""Runs the parts one after the other, each in a process of its own, and writes the report after each."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhfbench.errors import RunFolderError
from rlhfbench.evidence.items import read_items
from rlhfbench.evidence.parts import MAX_PART_S, PARTS
from rlhfbench.evidence.report import report
from rlhfbench.evidence.request import Request
from rlhfbench.files import write_atomically
from rlhfbench.runs import environment
from rlhfbench.runs.faults import last_line

EVIDENCE_NAME, REPORT_NAME, LOCK_NAME = "evidence.json", "report.md", "lock"
_MIN_PART_S = 5.0
_GRACE_S = 5.0
DONE = "done"


def collect(folder: Path, request: Request, numbers: Iterable[int], budget_s: float) -> dict[str, Any]:
    """Runs the parts that are not done yet, within ``budget_s`` seconds, and writes the report.

    A part that fails or takes too long does not stop the next. What it has measured is kept, and the next call goes on
    from there, but only under the same conditions: the report names one environment above all figures.

    Args:
        folder: new or empty, or the folder of the same request in the same environment.
        request: what to collect.
        numbers: of the parts.
        budget_s: seconds for all parts.

    Returns:
        The content of ``evidence.json``: ``environment`` and, by number, ``parts`` with ``outcome`` (``done``,
        ``failed``, ``timeout`` or ``no time``), ``wall_s`` and ``error``.

    Raises:
        RunFolderError: the folder cannot be used, or another process uses it.
    """
    request.write(folder)
    with _locked(folder):
        return _collect(folder, request, numbers, time.monotonic() + budget_s)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of ``folder``: another process would write the same files.

    Raises:
        RunFolderError: another process holds it, or it cannot be locked.
    """
    import fcntl  # here, as Windows has none

    try:
        lock = (folder / LOCK_NAME).open("a")
    except OSError as error:
        raise RunFolderError(f"out '{folder}' cannot be written: {error.strerror}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(f"out '{folder}' is in use: another rlhfbench is running in it.") from None
        except OSError as error:
            raise RunFolderError(f"out '{folder}' cannot be locked: {error.strerror}.") from error
        yield


def _collect(folder: Path, request: Request, numbers: Iterable[int], ends_s: float) -> dict[str, Any]:
    """Implements ``collect`` in a folder that is locked."""
    present = environment.describe(argv=sys.argv, settings=dataclasses.asdict(request))
    found = {"environment": present, "parts": {}, **read_items(folder / EVIDENCE_NAME)}
    changed = environment.differences(present, [found["environment"]])
    if changed:
        raise RunFolderError(
            f"out '{folder}' was begun under other conditions: {'; '.join(changed)}: name a new folder."
        )
    _write(folder, found)  # before any part, so that a part that is cut short leaves its environment too
    for number in numbers:
        earlier = found["parts"].get(str(number))
        if earlier is not None and earlier["outcome"] == DONE:
            continue
        left_s = min(MAX_PART_S, ends_s - time.monotonic())
        found["parts"][str(number)] = _run_part(folder, number, left_s)
        _write(folder, found)
    return found


def _write(folder: Path, found: dict[str, Any]) -> None:
    try:
        write_atomically(folder / EVIDENCE_NAME, json.dumps(found, indent=1) + "\n")
        write_atomically(folder / REPORT_NAME, report(folder, found))
    except OSError as error:
        raise RunFolderError(f"out '{folder}' cannot be written: {error.strerror}.") from error


def _run_part(folder: Path, number: int, left_s: float) -> dict[str, Any]:
    """Runs one part and returns its outcome."""
    if left_s < _MIN_PART_S:
        return {"outcome": "no time", "wall_s": 0.0, "error": None}
    print(f"part {number}, at most {left_s:.0f} s: {PARTS[number].title}", file=sys.stderr)
    log = folder / f"part-{number}.log"
    started_s = time.monotonic()
    module = "rlhfbench.evidence.part_process"
    # -P: a random.py in the user's folder must not replace the standard library's.
    command = [sys.executable, "-P", "-m", module, str(folder), str(number), f"{left_s:.1f}"]
    with log.open("a") as output:
        begins_at = output.tell()  # earlier tries wrote the lines before
        # A session of its own, so that a signal reaches the part's own children too.
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            code: int | None = process.wait(left_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    wall_s = time.monotonic() - started_s
    said = last_line(log.read_bytes()[begins_at:].decode(errors="replace"))
    outcome = "timeout" if code is None else "failed" if code else DONE
    print(f"part {number} {outcome} after {wall_s:.0f} s", file=sys.stderr)
    return {"outcome": outcome, "wall_s": wall_s, "error": None if outcome == DONE else said or f"exit code {code}"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of a part: it, its fork server and the case that runs."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
