"""The folder of a run: its files, and the checks before a run starts or resumes in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhfbench.cases.sweep import Sweep, differences
from rlhfbench.errors import RunFolderError, SweepError
from rlhfbench.files import write_atomically
from rlhfbench.records.file import RECORDS_NAME

SWEEP_NAME = "sweep.toml"
ENVIRONMENT_NAME = "environment.json"
TIMELINES_NAME = "timelines"


class RunFolder:
    """The paths of a run. Its files are written in the order sweep, environment, records.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def sweep_path(self) -> Path:
        """File of the sweep, with every default written out."""
        return self.path / SWEEP_NAME

    @property
    def traces_dir(self) -> Path:
        """Folder of the profiler's traces."""
        return self.path / "traces"

    @property
    def is_run(self) -> bool:
        """True if the folder holds a run, finished or not."""
        return self.sweep_path.is_file() or (self.path / RECORDS_NAME).is_file()

    @property
    def timelines_dir(self) -> Path:
        """Folder of the timelines, one file a case."""
        return self.path / TIMELINES_NAME

    def log_path(self, case_id: str) -> Path:
        """Log of a case: its output, and the traceback if it failed."""
        return self.path / "logs" / f"{case_id}.log"

    def prepare(self, sweep: Sweep, *, resume: bool) -> None:
        """Creates the folder for a run of ``sweep``, or checks that it holds the run to resume.

        Raises:
            RunFolderError: it holds other files or another run, or cannot be written.
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
            raise RunFolderError(f"out '{self.path}' holds files of something else: name an empty or a new folder.")
        if not resume:
            raise RunFolderError(
                f"out '{self.path}' holds another run: add --resume to continue it, or name a new folder."
            )
        recorded = self.load_sweep()
        if {case.id for case in recorded.cases} != {case.id for case in sweep.cases}:
            raise RunFolderError(
                f"out '{self.path}' holds a run of a different sweep: {differences(sweep.cases, recorded.cases)}."
            )

    def load_sweep(self) -> Sweep:
        """The sweep of the run in this folder.

        Raises:
            RunFolderError: its sweep cannot be read.
        """
        try:
            return Sweep.from_file(self.sweep_path)
        except SweepError as error:
            raise RunFolderError(f"out '{self.path}' holds no run that can be resumed: {error.problems[0]}") from error

    def write_environment(self, environment: dict[str, Any]) -> None:
        """Writes the environment of a run; that of a resumed run is added under ``resumed``.

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
