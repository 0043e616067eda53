"""The measurement of a benchmark: the record of a case, and the gate's findings on it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import GateError, RlhfBenchError
from rlhfbench.gate import Compared, compare_in_words
from rlhfbench.gate.findings import Finding
from rlhfbench.gate.sides import temporary_folder
from rlhfbench.records.file import RecordsFile
from rlhfbench.runs.case_process import ThisMachine
from rlhfbench.runs.case_runner import Runner
from rlhfbench.runs.folder import RunFolder
from rlhfbench.runs.forkserver import WARM, ForkServer
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.progress import Silent
from rlhfkernels.config.case import Case


class Measurer:
    """Measures cases as ``rlhfbench run`` does, each in its own process. The fork server starts with the first."""

    def __init__(self, sweep: Sweep, time_budget_s: float) -> None:
        self._sweep, self._time_budget_s = sweep, time_budget_s
        self._opened = ExitStack()
        self._runner: Runner | None = None

    def measure(self, case: Case) -> dict[str, Any]:
        """Measures ``case`` and returns its record.

        Raises:
            RlhfBenchError: The fork server does not start, or the disk is full.
        """
        if self._runner is None:
            self._runner = self._open()
        self._runner.run([case])
        self._runner.run_blocks([case])
        return self._records.records[-1]

    def _open(self) -> Runner:
        folder = RunFolder(self._opened.enter_context(tempfile.TemporaryDirectory(prefix="rlhfbench-")))
        folder.prepare(self._sweep, resume=False)
        self._records = self._opened.enter_context(RecordsFile(folder.path))
        machine = ThisMachine(self._opened.enter_context(ForkServer(optional=WARM)))
        return Runner(folder, RunOptions(time_budget_s=self._time_budget_s), self._records, machine, Silent())

    def close(self) -> None:
        """Ends the fork server and removes its files."""
        self._opened.close()


class Gate:
    """Compares the cases of a sweep with a revision or a stored run, when the first test asks.

    Args:
        base: The revision, or the folder of a run.
        sweep: The cases.

    Attributes:
        compared: What was compared and found; ``None`` until a test asks, and if the two cannot be compared.
    """

    def __init__(self, base: str, sweep: Sweep) -> None:
        self._named, self._sweep = base, sweep
        self.compared: Compared | None = None
        self._error: RlhfBenchError | None = None

    def select(self, cases: Sequence[Case]) -> None:
        """Has the gate compare these cases of the sweep alone. A stored run is compared whole."""
        self._sweep = Sweep(cases=tuple(cases))

    def findings(self, case: Case) -> list[Finding]:
        """Returns the findings on ``case``.

        Raises:
            RlhfBenchError: The two cannot be compared.
        """
        if self.compared is None and self._error is None:
            try:
                with temporary_folder() as folder:
                    self.compared = compare_in_words(self._named, self._sweep, folder)
            except RlhfBenchError as error:  # the next test fails with it too, and not after trying again
                self._error = error
        if self.compared is None:
            assert self._error is not None
            raise self._error
        (compared,) = Sweep(cases=(case,)).absolute().cases
        found = [found for found in self.compared.findings if found.case.id == compared.id]
        if not found:
            raise GateError(f"'{self._named}' has no such case: it cannot be compared.")
        return found
