"""A run's folder: what is in it, when it may be used, and how a run in it is resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rlhfbench.cases.sweep import Sweep, differences
from rlhfbench.errors import RunFolderError, SweepError
from rlhfbench.records.file import RECORDS_NAME

SWEEP_NAME = "sweep.toml"
ENVIRONMENT_NAME = "environment.json"
TIMELINES_NAME = "timelines"


class RunFolder:
    """The paths of a run. Its files appear in the order sweep, environment, records: with the sweep it is a run.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def sweep_path(self) -> Path:
        """The resolved sweep."""
        return self.path / SWEEP_NAME

    @property
    def traces_dir(self) -> Path:
        """Where the profiler's traces go."""
        return self.path / "traces"

    @property
    def is_run(self) -> bool:
        """Whether it holds a run, finished or not."""
        return self.sweep_path.is_file() or (self.path / RECORDS_NAME).is_file()

    @property
    def timelines_dir(self) -> Path:
        """Where the timelines of the cases go, one file each."""
        return self.path / TIMELINES_NAME

    def log_path(self, case_id: str) -> Path:
        """What a case printed, and the traceback of its failure."""
        return self.path / "logs" / f"{case_id}.log"

    def prepare(self, sweep: Sweep, *, resume: bool) -> None:
        """Makes the folder ready for a run of ``sweep``, or looks whether it is the one to resume.

        Raises:
            RunFolderError: it holds something else, holds another run, or cannot be written.
        """
        try:
            if self.path.is_dir() and any(self.path.iterdir()):
                self._check_present(sweep, resume=resume)
            for folder in (self.path, self.log_path("").parent, self.traces_dir):
                folder.mkdir(parents=True, exist_ok=True)
            if not self.sweep_path.exists():
                write_atomically(self.sweep_path, sweep.to_toml())
        except OSError as error:
            raise RunFolderError(f"out '{self.path}' cannot be written: {error.strerror}.") from error

    def _check_present(self, sweep: Sweep, *, resume: bool) -> None:
        if not self.is_run:
            raise RunFolderError(f"out '{self.path}' holds files that are no run: name an empty or a new folder.")
        if not resume:
            raise RunFolderError(
                f"out '{self.path}' holds another run: add --resume to go on with it, or name a new folder."
            )
        there = self.load_sweep()
        if {case.id for case in there.cases} != {case.id for case in sweep.cases}:
            raise RunFolderError(
                f"out '{self.path}' holds a run of a different sweep: {differences(sweep.cases, there.cases)}."
            )

    def load_sweep(self) -> Sweep:
        """The sweep of the run in this folder.

        Raises:
            RunFolderError: there is none that can be read.
        """
        try:
            return Sweep.from_file(self.sweep_path)
        except SweepError as error:
            raise RunFolderError(f"out '{self.path}' holds no run that can be resumed: {error.problems[0]}") from error

    def write_environment(self, environment: dict[str, Any]) -> None:
        """Keeps ``environment``: as the run's own, or under ``resumed`` where the run was started before.

        Raises:
            RunFolderError: it cannot be written.
        """
        path = self.path / ENVIRONMENT_NAME
        try:
            first = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
            if isinstance(first, dict):
                environment = {**first, "resumed": [*first.get("resumed", []), environment]}
            else:
                environment = {**environment, "resumed": []}
            write_atomically(path, json.dumps(environment, indent=2) + "\n")
        except ValueError as error:
            raise RunFolderError(f"'{path}' is not JSON: move it away to resume.") from error
        except OSError as error:
            raise RunFolderError(f"out '{self.path}' cannot be written: {error.strerror}.") from error


def write_atomically(path: Path, text: str) -> None:
    """Writes ``text`` so that nobody finds half of it, whenever the writer is killed."""
    draft = path.with_name(path.name + ".tmp")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
