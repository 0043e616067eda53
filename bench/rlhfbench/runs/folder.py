"""The folder of a run: its files, and the checks before a run starts or resumes in it."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhfbench.cases.sweep import Sweep, differences
from rlhfbench.errors import RunFolderError, SweepError
from rlhfbench.files import write_atomically, write_new
from rlhfbench.records.file import RECORDS_NAME

SWEEP_NAME = "sweep.toml"
ENVIRONMENT_NAME = "environment.json"
TIMELINES_NAME = "timelines"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A run from its start, or from a resumption, to its end: the environment of its records.

    Attributes:
        run_id: of the whole run.
        number: 0 for the first segment, n for the n-th entry of ``resumed`` in the environment.
        host: name of the machine.
    """

    run_id: str
    number: int
    host: str | None

    def to_dict(self) -> dict[str, Any]:
        """The ``run`` object of a record."""
        return {"id": self.run_id, "segment": self.number, "host": self.host}


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

    @property
    def logs_dir(self) -> Path:
        """Folder of the logs."""
        return self.path / "logs"

    def log_path(self, case_id: str) -> Path:
        """Log of a case: its output, and the traceback if it failed."""
        return self.logs_dir / f"{case_id}.log"

    def prepare(self, sweep: Sweep, *, resume: bool) -> None:
        """Creates the folder for a run of ``sweep``, or checks that it holds the run to resume.

        Raises:
            RunFolderError: it holds other files or another run, holds none to resume, or cannot be written.
        """
        try:
            if self.path.is_dir() and any(self.path.iterdir()):
                self._check_present(sweep, resume=resume)
            elif resume:
                self.check_is_run()
            # The sweep comes first: with it alone, a start that fails later can be resumed.
            self.path.mkdir(parents=True, exist_ok=True)
            if not resume:
                self._write_sweep(sweep)
            for folder in (self.logs_dir, self.traces_dir):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"out '{self.path}' cannot be written: {error.strerror}.") from error

    def check_is_run(self) -> None:
        """Checks that there is a run to resume.

        Raises:
            RunFolderError: there is none.
        """
        if not self.is_run:
            raise RunFolderError(f"resume '{self.path}': there is no run in it, so there is nothing to resume.")

    def _check_present(self, sweep: Sweep, *, resume: bool) -> None:
        if not self.is_run:
            raise RunFolderError(f"out '{self.path}' holds files of something else: name an empty or a new folder.")
        if not resume:
            raise self._holds_another()
        recorded = self.load_sweep()
        if {case.id for case in recorded.cases} != {case.id for case in sweep.cases}:
            raise RunFolderError(
                f"out '{self.path}' holds a run of a different sweep: {differences(sweep.cases, recorded.cases)}."
            )

    def _write_sweep(self, sweep: Sweep) -> None:
        try:
            write_new(self.sweep_path, sweep.to_toml())
        except FileExistsError:  # another run started since the check
            raise self._holds_another() from None

    def _holds_another(self) -> RunFolderError:
        return RunFolderError(f"out '{self.path}' holds another run: continue it with --resume, or name a new folder.")

    def load_sweep(self) -> Sweep:
        """The sweep of the run in this folder.

        Raises:
            RunFolderError: its sweep cannot be read.
        """
        try:
            return Sweep.from_file(self.sweep_path)
        except SweepError as error:
            raise RunFolderError(f"out '{self.path}' holds no run that can be resumed: {error.problems[0]}") from error

    def write_environment(self, environment: dict[str, Any]) -> Segment:
        """Writes the environment of a run; that of a resumed run is added under ``resumed``.

        Raises:
            RunFolderError: it cannot be written.
        """
        earlier = self.environments()
        run_id = str(earlier[0].get("run_id") or secrets.token_hex(6)) if earlier else secrets.token_hex(6)
        self._write_environments(run_id, [*earlier, environment])
        return Segment(run_id=run_id, number=len(earlier), host=environment.get("host"))

    def add_nodes(self, environments: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds the environments of machines, by name, to the present segment under ``nodes``.

        Raises:
            RunFolderError: they cannot be written.
        """
        *earlier, present = self.environments()
        present = {**present, "nodes": {**present.get("nodes", {}), **environments}}
        run_id = str((earlier or [present])[0]["run_id"])
        self._write_environments(run_id, [*earlier, present])

    def _write_environments(self, run_id: str, environments: Sequence[Mapping[str, Any]]) -> None:
        first, *resumed = environments
        written = {"run_id": run_id, **first, "resumed": resumed}
        try:
            write_atomically(self.path / ENVIRONMENT_NAME, json.dumps(written, indent=2) + "\n")
        except OSError as error:
            raise RunFolderError(f"out '{self.path}' cannot be written: {error.strerror}.") from error

    def environments(self) -> list[dict[str, Any]]:
        """The environments of the segments of the run: of its start, then of each time that it was resumed.

        Raises:
            RunFolderError: the file cannot be read, or holds something else.
        """
        path = self.path / ENVIRONMENT_NAME
        try:
            first = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunFolderError(f"'{path}' cannot be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise RunFolderError(f"'{path}' is not JSON: restore it; only a new run can do without it.") from error
        resumed = first.pop("resumed", []) if isinstance(first, dict) else None
        if not isinstance(resumed, list) or not all(isinstance(segment, dict) for segment in resumed):
            raise RunFolderError(
                f"'{path}' is not the environment of a run: restore it; only a new run can do without it."
            )
        return [first, *resumed]

    def settings(self) -> dict[str, Any]:
        """The settings of the run's last segment; empty where none are recorded.

        Raises:
            RunFolderError: the environment cannot be read.
        """
        last = (self.environments() or [{}])[-1].get("settings")
        return last if isinstance(last, dict) else {}
