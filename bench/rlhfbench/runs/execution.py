"""The seam between a run and what executes its cases: this machine, or a cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.progress import Progress
from rlhfkernels.config.case import Case


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One block of one case, to be run in a fresh process.

    Attributes:
        case: the case.
        request: what the process receives; see ``rlhfbench.runs.worker.run_case``. ``None``: predict only.
        log_path: receives the output of the process.
        timeout_s: seconds after which the process is killed.
        with_plan: predict the memory of the case first, in a process of its own.
    """

    case: Case
    request: Mapping[str, Any] | None
    log_path: Path
    timeout_s: float
    with_plan: bool = False

    @property
    def plan_log_path(self) -> Path:
        """Log of the process that predicts."""
        return self.log_path.with_name(f"{self.log_path.stem}-plan.log")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """A task that has ended, in whichever way.

    Attributes:
        task: the task.
        result: what the process sent, with ``outcome`` and ``error``, or what was concluded from its death.
        started_at: UTC, ISO 8601.
        wall_s: seconds from the request to the end.
        max_rss_bytes: largest resident set of the process.
        driver_peak_bytes: the driver's view of its peak on CUDA.
        plan: the ``plan`` of the record.
        plan_timeline: the timeline of the predicted step.
        host: name of the machine that ran it; ``None`` for the machine of the run.
        is_lost: the machine died with it.
    """

    task: Task
    result: Mapping[str, Any]
    started_at: str
    wall_s: float = 0.0
    max_rss_bytes: int | None = None
    driver_peak_bytes: int | None = None
    plan: Mapping[str, Any] | None = None
    plan_timeline: Mapping[str, Any] | None = None
    host: str | None = None
    is_lost: bool = False


Start = Callable[[Case], Task | None]
Hosts = Mapping[str, str | None]  # the only machine that may run a case, by the case's id


class Executor(Protocol):
    """Runs the blocks of cases. It is closed by whoever made it."""

    def start(self, *, round_s: float = 0.0) -> None:
        """Prepares what cases wait for, such as imports.

        Args:
            round_s: seconds of the round of blocks that has ended. Processes that share something, such as a server
                that they are forked from, are replaced if that takes less.
        """

    def run(
        self, cases: Sequence[Case], start: Start, hosts: Mapping[str, str | None] | None = None
    ) -> Iterator[Ended]:
        """Runs a task of each case and yields each as it ends.

        Args:
            cases: the cases, in the order in which they should start.
            start: called right before a case starts. Returns its task, or ``None`` to leave the case out.
            hosts: the machines that cases are bound to. Without it, any machine may run a case.
        """

    def can_run_on(self, host: str | None) -> bool:
        """True if the machine of that name can run cases."""

    def close(self) -> None:
        """Ends every process."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """The facts of a run that a place needs before it executes cases.

    Attributes:
        folder: folder of the run.
        cases: the cases of the sweep.
        hosts: names of the machines of recorded cases that are ok, by the cases' ids.
        options: how the cases are run.
        model_types: architectures in ``transformers`` whose modules are imported before cases are forked.
        environment: arguments of ``rlhfbench.runs.environment.describe``.
        add_nodes: records the environments of machines, by their names.
        progress: receives notices.
    """

    folder: Path
    cases: Sequence[Case]
    hosts: Mapping[str, str | None]
    options: RunOptions
    model_types: Sequence[str]
    environment: Mapping[str, Any]
    add_nodes: Callable[[Mapping[str, Mapping[str, Any]]], None]
    progress: Progress


class Place(Protocol):
    """A place other than this machine that executes the cases of a run."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that the environment of the run records, for the run that resumes this one."""

    def make_executor(self, setup: Setup) -> Executor:
        """An executor of the run; the caller closes it."""
