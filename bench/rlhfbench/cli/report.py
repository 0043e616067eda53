"""``rlhfbench report``: draws a run again from its records, or compares several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhfbench.cli.common import READING_CODES, draw, epilog, needing_packages, path_text, print_table
from rlhfbench.errors import RecordsError, RunFolderError, SweepError
from rlhfbench.files import check_writable
from rlhfbench.launch import refuse_launcher

EPILOG = epilog(
    "rlhfbench report rlhfbench-run-20260101T120000Z",
    "rlhfbench report before after --out comparison",
    "rlhfbench report my-run --paper",
    "rlhfbench report my-ranks my-plan",
    "rlhfbench report before after --same-machine",
    codes=READING_CODES,
)


def report(
    run_dirs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN [RUN…]",
            parser=path_text("RUN"),
            help="Folders of runs, or of one run and of plan --out.",
            show_default=False,
        ),
    ],
    paper: Annotated[
        bool, typer.Option("--paper", help="Compare the run with the published numbers of Hydra-RLHF and trlX.")
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            parser=path_text("--out"),
            help="Folder of the page of several runs; by default the first run's.",
        ),
    ] = None,
    same_machine: Annotated[
        bool,
        typer.Option(
            "--same-machine",
            help="Treat all hosts as one machine (containers have names of their own), so that times are compared; the "
            "report states this.",
        ),
    ] = False,
) -> None:
    """Draw a run again from its records, or compare several.

    Prints which differences the run can tell apart, the memory table, slopes and gain. Draws the timeline of every
    case (of the largest ones in a run of more than 100 cases) and writes the page index.html. Several runs are compared
    with the first one in comparison.html. Plans of cases over ranks are shown beside the measured run.
    """
    refuse_launcher("rlhfbench report")
    from rlhfbench.records.file import RECORDS_NAME, read_records
    from rlhfbench.records.plans import PLAN_NAME

    paths = {each: Path(each) for each in run_dirs}
    plan_dirs = [path for path in paths.values() if (path / PLAN_NAME).is_file() and not (path / RECORDS_NAME).exists()]
    run_dirs = [each for each in run_dirs if paths[each] not in plan_dirs]
    if plan_dirs and len(run_dirs) != 1:
        raise SweepError([f"'{plan_dirs[0]}' is a plan: it must be given with one run, and {len(run_dirs)} are given."])
    if out is not None and len(run_dirs) < 2:
        raise SweepError([f"--out is {out!r}: it needs two runs or more; the report of one run goes into its folder."])
    if len({Path(run_dir).resolve() for run_dir in run_dirs}) < len(run_dirs):
        raise SweepError(["RUN names one folder twice: compare a run with another one."])
    check_writable("run" if out is None else "out", Path(out or run_dirs[0]))
    for run_dir in run_dirs:
        if not read_records(run_dir):
            raise RecordsError(f"run '{run_dir}' holds no records yet: there is nothing to draw.")
    if len(run_dirs) == 1:
        how = {"with_paper": paper, "same_machine": same_machine, "plan_dirs": plan_dirs}
        print_table(draw(Path(run_dirs[0]), whole=True, **how))
        return
    folder = Path(out or run_dirs[0])
    _compare([Path(run_dir) for run_dir in run_dirs], folder, with_paper=paper, same_machine=same_machine)


def _compare(run_dirs: list[Path], folder: Path, *, with_paper: bool, same_machine: bool) -> None:
    """Writes the page of several runs and prints its first sentences."""
    from rlhfbench.records.file import read_records
    from rlhfbench.runs.drawing import check_drawable
    from rlhfbench.runs.page import COMPARISON_NAME, missing_libraries, write_run_page

    missing = missing_libraries()
    if missing:
        raise RunFolderError(f"the page of several runs needs libraries: pip install {' '.join(missing)}.")
    for run_dir in run_dirs:
        check_drawable(run_dir, read_records(run_dir))
    path = folder / COMPARISON_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with needing_packages("the comparison"):
            sentences = write_run_page(run_dirs, path, with_paper=with_paper, same_machine=same_machine)
    except OSError as error:
        raise RunFolderError(f"out '{folder}' cannot be written: {error.strerror}.") from error
    for sentence in sentences:
        print(sentence)
    print(f"The comparison is in {path}.")
