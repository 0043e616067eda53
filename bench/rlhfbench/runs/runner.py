"""Runs a sweep in its folder: on this machine, on a cluster, or in the processes of a launcher."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rlhfbench.cases import preflight
from rlhfbench.cases.model_facts import ModelFacts
from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import RunFolderError, SweepError
from rlhfbench.launch import Launch, find_launch
from rlhfbench.records.file import Entry, Record, RecordsFile
from rlhfbench.records.schema import OUTCOMES
from rlhfbench.runs import environment
from rlhfbench.runs.case_process import ThisMachine
from rlhfbench.runs.case_runner import Runner
from rlhfbench.runs.execution import Executor, Place, Setup
from rlhfbench.runs.folder import RunFolder, Segment
from rlhfbench.runs.follower import follower
from rlhfbench.runs.forkserver import WARM, ForkServer
from rlhfbench.runs.job import Exit
from rlhfbench.runs.leader import leader
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.progress import Progress, make_progress
from rlhfbench.runs.ranks import run_ranks
from rlhfbench.runs.titles import Titles
from rlhfkernels.config.content import content_hash
from rlhfkernels.naming import unknown


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """The result of a run.

    Attributes:
        run_dir: folder of the run.
        records: one per case that was reached, in the order in which they were made.
        interrupted: Ctrl-C ended the run before its last case.
    """

    run_dir: Path
    records: list[Record]
    interrupted: bool

    @property
    def num_ok(self) -> int:
        """Number of cases that were measured."""
        return sum(record["outcome"] == "ok" for record in self.records)


def run_sweep(
    sweep: Sweep,
    out_dir: str | Path,
    options: RunOptions | None = None,
    *,
    resume: bool = False,
    retry: Collection[str] = (),
    progress: Progress | None = None,
    place: Place | None = None,
) -> RunResult:
    """Runs every case of ``sweep`` that is not recorded yet, each in a process of its own.

    In a process of torchrun or Slurm's ``srun`` that is not rank 0's, it starts this process's rank of every case that
    rank 0 runs, and returns without records when that run ends.

    Args:
        sweep: the cases, in their order.
        out_dir: folder of the run: new or empty, or with ``resume`` the folder of a run of the same sweep.
        options: how the cases are run; by default as the run to resume was, or with the defaults of ``RunOptions``.
        resume: continue the run in ``out_dir``.
        retry: outcomes whose recorded cases are run again when resumed.
        progress: receives what happens; by default it is written to standard error.
        place: executes the cases; by default this machine.

    Returns:
        The records of all cases that were reached.

    Raises:
        SweepError: this machine cannot run the sweep; every problem is named.
        RunFolderError: the folder cannot be used.
        RecordsError: the records cannot be read, or cannot be written (a full disk).
        ForkServerError: the process that cases are forked from does not start.
    """
    return run_cases(
        lambda runner, absolute: runner.run_missing(absolute.cases),
        sweep,
        out_dir,
        options,
        resume=resume,
        retry=retry,
        progress=progress,
        place=place,
    )


def run_cases(
    run: Callable[[Runner, Sweep], None],
    sweep: Sweep,
    out_dir: str | Path,
    options: RunOptions | None,
    *,
    resume: bool,
    retry: Collection[str],
    progress: Progress | None,
    max_batch_limit: int | None = None,
    place: Place | None = None,
) -> RunResult:
    """Opens the folder of a run, calls ``run`` with a runner in it, and returns what was recorded.

    Arguments and errors are those of ``run_sweep``. ``run`` chooses the cases; it receives the sweep with absolute
    paths, so that a folder can be resumed from anywhere. ``max_batch_limit`` is recorded for the search that resumes
    this one.
    """
    environment.check_system()
    if not sweep.cases:
        raise SweepError(["the sweep has no cases: it must have at least one."])
    retry = [retry] if isinstance(retry, str) else list(retry)
    wrong = [unknown("retry", outcome, OUTCOMES) for outcome in retry if outcome not in OUTCOMES]
    if wrong:
        raise SweepError(wrong)
    launch = find_launch()
    if launch is not None and launch.rank:
        follow_launcher()
        return RunResult(run_dir=Path(out_dir), records=[], interrupted=False)
    with _starter(launch) as runs_ranks:
        folder = RunFolder(out_dir)
        if resume:
            folder.check_is_run()
        options = options or RunOptions.recorded(folder.settings() if resume else {})
        progress = progress or make_progress()
        facts = preflight.check(sweep, devices=place is None)
        for notice in preflight.notices(sweep):
            progress.notice(notice)
        sweep = sweep.absolute()
        folder.prepare(sweep, resume=resume)
        settings = {**dataclasses.asdict(options), "max_batch_limit": max_batch_limit}
        settings |= {} if place is None else dict(place.settings)
        described = _described(sweep, facts, settings, "none" if launch is None else leader().layout)
        with RecordsFile(folder.path) as records:
            if resume:
                _tell_of_added(options, folder.settings(), records.measured, progress)
            segment = _begin_segment(folder, described, progress)
            setup = Setup(
                folder=folder.path,
                cases=sweep.cases,
                hosts={entry.case_id: entry.host for entry in records.entries.values() if entry.outcome == "ok"},
                options=options,
                model_types=list(dict.fromkeys(model.model_type for model in facts.values() if model.model_type)),
                environment=described,
                add_nodes=folder.add_nodes,
                progress=progress,
            )
            how: dict[str, Any] = {"segment": segment, "retry": retry, "title": Titles(sweep.cases)}
            interrupted = False
            try:
                with closing(_make_executor(setup, place, runs_ranks)) as executor:
                    run(Runner(folder, options, records, executor, progress, **how), sweep)
            except KeyboardInterrupt:
                interrupted = True
            except OSError as error:  # such as a folder that was removed in mid-run
                reason = error.strerror or error
                raise RunFolderError(f"out '{folder.path}' cannot be used any more: {reason}.") from error
            finally:
                progress.end()
            return RunResult(run_dir=folder.path, records=records.records, interrupted=interrupted)


def follow_launcher() -> None:
    """Starts this process's rank of every case of the run that the launcher's process of rank 0 makes.

    Raises:
        SweepError: rank 0 does not answer, or is gone.
    """
    found = follower()  # first, since rank 0 waits for all to come
    with make_server() as server:
        found.follow(server)


@contextmanager
def _starter(launch: Launch | None) -> Iterator[Callable[..., Exit]]:
    """The function that runs a case of several ranks: here, or with the other processes of a launcher.

    These end with the block, whatever becomes of the run.
    """
    if launch is None:
        yield run_ranks
        return
    first = leader()
    try:
        first.start()
        yield first.run
    finally:
        first.end()


def _described(
    sweep: Sweep, facts: Mapping[str, ModelFacts], settings: Mapping[str, Any], launched_ranks: str
) -> dict[str, Any]:
    """The arguments of ``environment.describe`` for a run of ``sweep``."""
    files = dict.fromkeys(case.data_file for case in sweep.cases if case.data_file is not None)
    return {
        "argv": sys.argv,
        "settings": settings,
        "revisions": {name: model.revision for name, model in facts.items() if model.revision is not None},
        "data_files": {file: content_hash(file) for file in files},
        "launched_ranks": launched_ranks,
    }


def _tell_of_added(
    options: RunOptions, before: Mapping[str, Any], measured: Sequence[Entry], progress: Progress
) -> None:
    """Tells which options are new in a resumed run and do not reach the cases that are already measured."""
    names = ("with_plan", "profile")
    added = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) and not before.get(name)]
    if added and measured:
        progress.notice(
            f"{' and '.join(added)} {'holds' if len(added) == 1 else 'hold'} for cases that are run from now on: "
            f"{len(measured)} already measured {'stays' if len(measured) == 1 else 'stay'} as recorded."
        )


def _begin_segment(folder: RunFolder, described: Mapping[str, Any], progress: Progress) -> Segment:
    """Records the environment, and tells what differs from that of the run that is resumed."""
    earlier = folder.environments()
    environment.check_data_files(described["data_files"], earlier)
    present = environment.describe(**described)
    changed = environment.changes(present, earlier)
    if changed is not None:
        progress.notice(changed)
    return folder.write_environment(present)


def _make_executor(setup: Setup, place: Place | None, runs_ranks: Callable[..., Exit]) -> Executor:
    if place is not None:
        return place.make_executor(setup)
    return ThisMachine(make_server(setup.model_types), setup.progress, runs_ranks=runs_ranks)


def make_server(model_types: Iterable[str] = ()) -> ForkServer:
    """The fork server of a run, not started.

    It imports the module of each architecture too, which saves half a second a case.
    """
    architectures = (f"transformers.models.{name}.modeling_{name}" for name in model_types)
    return ForkServer(optional=[*WARM, *architectures])
