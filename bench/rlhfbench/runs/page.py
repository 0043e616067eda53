"""Reads runs as the interactive page takes them, and writes the page where its libraries are installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfbench.errors import RecordsError, SweepError
from rlhfbench.records.derived import at
from rlhfbench.records.file import read_records
from rlhfbench.records.profiles import profile_frames, read_profile
from rlhfbench.records.timelines import planned, read_timeline, tensors_frame, timeline_frames
from rlhfbench.runs.conditions import with_conditions
from rlhfbench.runs.folder import SWEEP_NAME, RunFolder

if TYPE_CHECKING:
    import pandas as pd

    from rlhfreports.page.data import Profile, Run, Timeline

Loaded = tuple[list[dict[str, Any]], "pd.DataFrame"]  # records and their frame
PAGE_NAME, COMPARISON_NAME = "index.html", "comparison.html"
_LIBRARIES = {"altair": "altair", "vl_convert": "vl-convert-python", "itables": "itables", "jinja2": "jinja2"}


def missing_libraries() -> list[str]:
    """Names, as pip has them, of the libraries that the page needs and that are not installed."""
    return [name for module, name in _LIBRARIES.items() if importlib.util.find_spec(module) is None]


def read_run(run_dir: Path, name: str | None = None, loaded: Loaded | None = None) -> Run:
    """Reads a run: its records, environments, sweep, and the timelines of its largest cases.

    Args:
        run_dir: a folder with ``records.jsonl``. Other files may be absent.
        name: of the run in the page; by default that of the folder.
        loaded: the records and their frame where the caller has read them: both take seconds for 1,000 cases.

    Raises:
        RecordsError: a file cannot be read.
        RunFolderError: the environment cannot be read.
    """
    from rlhfbench.records.frame import blocks_frame, ranks_frame, records_frame
    from rlhfbench.runs.drawing import largest_cases
    from rlhfreports.page.data import Run

    records = read_records(run_dir) if loaded is None else loaded[0]
    folder = RunFolder(run_dir)
    environments = folder.environments()
    frame = with_conditions(records_frame(records), environments) if loaded is None else loaded[1]
    return Run(
        name=name or run_dir.resolve().name,
        frame=frame,
        blocks=blocks_frame(records),
        ranks=ranks_frame(records),
        environments=environments,
        sweep=_text(run_dir / SWEEP_NAME),
        timelines=_timelines(largest_cases(frame), folder.timelines_dir),
        predicted_timelines=_timelines(largest_cases(frame), folder.timelines_dir, planned),
        profiles=_profiles(largest_cases(frame), folder.traces_dir),
    )


def run_names(run_dirs: Sequence[Path]) -> list[str]:
    """A name for each folder: its last part, with as many parts before it as tell all of them apart."""
    paths = [run_dir.resolve() for run_dir in run_dirs]
    for num_parts in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = ["/".join(path.parts[-num_parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({place})" for place, path in enumerate(paths, 1)]


def on_one_machine(frames: Sequence[pd.DataFrame], environments: Iterable[Mapping[str, Any]]) -> list[pd.DataFrame]:
    """``frames`` of runs with all their hosts as names of one machine, which the user says they are.

    Args:
        frames: frames of ``records_frame``.
        environments: of all these runs.

    Raises:
        SweepError: the runs were made on CPUs of two models.
    """
    from rlhfreports.columns import HOST, as_one_machine

    machines = [machine for segment in environments for machine in (segment, *(segment.get("nodes") or {}).values())]
    models = sorted({str(model) for machine in machines if (model := at(machine, "cpu.model")) is not None})
    if len(models) > 1:
        raise SweepError(
            [f"--same-machine: the runs were made on {' and '.join(models)}, which no machine has at once."]
        )
    hosts = list(dict.fromkeys(host for frame in frames for host in frame[HOST].dropna()))
    return [as_one_machine(frame, hosts) for frame in frames] if len(hosts) > 1 else list(frames)


def write_run_page(
    run_dirs: Sequence[Path],
    path: Path,
    *,
    with_paper: bool = False,
    same_machine: bool = False,
    loaded: Sequence[Loaded | None] = (),
    plans: pd.DataFrame | None = None,
) -> list[str]:
    """Writes the page of one run, or the comparison of several, and returns the sentences of the comparison.

    Args:
        run_dirs: one folder or more.
        path: of the page.
        with_paper: lay the papers' numbers beside the run.
        same_machine: all hosts are names of one machine.
        loaded: see ``read_run``, for each folder; empty to read all of them.
        plans: laid beside a single run, as a frame of records.

    Raises:
        RecordsError: a run cannot be read.
        RunFolderError: an environment cannot be read.
        SweepError: see ``on_one_machine``.
        OSError: the page cannot be written.
    """
    from rlhfreports.compare import compared, comparison_sentences
    from rlhfreports.page.data import Page
    from rlhfreports.page.render import write_page

    found = zip(run_dirs, run_names(run_dirs), loaded or [None] * len(run_dirs), strict=True)
    runs = [read_run(*entry) for entry in found]
    if same_machine:
        environments = itertools.chain.from_iterable(run.environments for run in runs)
        frames = on_one_machine([run.frame for run in runs], environments)
        runs = [
            dataclasses.replace(run, frame=with_conditions(frame, run.environments))
            for run, frame in zip(runs, frames, strict=True)
        ]
    page = Page.of(runs, with_paper=with_paper, plans=plans)
    write_page(page, path)
    return comparison_sentences(page.frame, compared(page.frame)) if len(runs) > 1 else []


def _timelines(cases: pd.DataFrame, folder: Path, name_of: Callable[[str], str] = str) -> dict[str, Timeline]:
    found = {str(case_id): read_timeline(folder, name_of(str(case_id))) for case_id in cases["case_id"]}
    return {
        case_id: (*timeline_frames(timeline), tensors_frame(timeline))
        for case_id, timeline in found.items()
        if timeline
    }


def _profiles(cases: pd.DataFrame, folder: Path) -> dict[str, Profile]:
    found = {str(case_id): read_profile(folder, str(case_id)) for case_id in cases["case_id"]}
    return {case_id: profile_frames(profile) for case_id, profile in found.items() if profile is not None}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise RecordsError(f"'{path}' cannot be read: {error}.") from error
