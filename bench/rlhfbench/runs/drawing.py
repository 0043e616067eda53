"""Draws the report of a run from its records: tables and plots, written into the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhfbench.errors import RecordsError
from rlhfbench.records.derived import at
from rlhfbench.records.file import Record, read_records
from rlhfbench.records.plans import read_plans
from rlhfbench.records.timelines import read_timeline, timeline_frames
from rlhfbench.runs.conditions import with_conditions
from rlhfbench.runs.folder import TIMELINES_NAME, RunFolder
from rlhfbench.runs.page import COMPARISON_NAME, PAGE_NAME, missing_libraries, on_one_machine, write_run_page

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import RenderableType

    from rlhfreports.tables import ReportTable


# The tables and plots that ``draw_run`` writes, each in some of these formats.
_DRAWN = (
    "memory_table", "latency", "throughput", "predicted", "slopes", "gain", "ranks", "scaling", "planned_ranks",
)  # fmt: skip
_FORMATS = (".md", ".csv", ".png", ".svg")
MAX_TIMELINES = 100  # pictures, which take half a second each
_DRAWN_FIELDS = ("method", "model", "prompt_len", "completion_len", "batch_size", "device", "dtype")


def draw_run(
    run_dir: Path,
    *,
    whole: bool = False,
    with_paper: bool = False,
    same_machine: bool = False,
    plan_dirs: Sequence[Path] = (),
) -> RenderableType:
    """Draws the report of the records in ``run_dir`` into that folder.

    Always ``memory_table`` (.md, .csv), ``latency`` and ``throughput`` (.png, .svg). ``index.html``, the interactive
    page, where its libraries are installed. ``slopes`` (.md, .csv) if a method was measured at two lengths or batch
    sizes; ``gain`` (.md, .csv) if the baseline was measured, and another method at two batch sizes; ``ranks`` (.md,
    .csv) if cases ran over ranks, and ``scaling`` (.md, .csv, .png, .svg) if some differ in their ranks alone;
    ``planned_ranks`` (.md, .csv) if cases over ranks were planned; ``predicted`` (.md, .png, .svg) if memory was
    predicted; pictures of the timelines beside them.

    Args:
        run_dir: a folder with ``records.jsonl``.
        whole: draw the timelines of all cases, up to 100 of them, not only of the largest case of each method and
            setting, and return more than the memory table.
        with_paper: lay the papers' numbers beside the run in the page.
        same_machine: all hosts of the run are names of one machine.
        plan_dirs: folders of ``plan --out``, whose plans of cases over ranks are laid beside the run.

    Returns:
        The memory table for a terminal and a line on the differences that the run can tell apart; as a ``whole`` that
        line first, then the memory table, slopes and gain.

    Raises:
        RecordsError: the records or a plan cannot be read, or one of them has no case over ranks.
        RunFolderError: the environment cannot be read.
        SweepError: see ``on_one_machine``.
        OSError: the folder cannot be written.
    """
    records = read_records(run_dir)
    check_drawable(run_dir, records)
    plan_records = [plan for plan_dir in plan_dirs for plan in _plans(plan_dir)]
    if plan_dirs:
        _check_ranks(run_dir, records)
    # Imported here, as pandas and matplotlib take most of a second, and `--help` imports this module.
    from rich.console import Group
    from rich.text import Text

    from rlhfbench.records.frame import records_frame
    from rlhfreports import gain_table, plots, slope_table
    from rlhfreports import table as memory_table
    from rlhfreports.gain import has_gain
    from rlhfreports.predicted import has_predictions, predicted_markdown
    from rlhfreports.predicted_plot import draw_predicted
    from rlhfreports.ranks import has_ranks
    from rlhfreports.ratios import resolution
    from rlhfreports.scaling import draw_scaling, planned_table, ranks_table, scaling_table

    frame = records_frame(records)
    plans = records_frame(plan_records)
    environments = RunFolder(run_dir).environments()
    if same_machine:
        (frame,) = on_one_machine([frame], environments)
    frame = with_conditions(frame, environments)
    memory = memory_table(frame)
    # Nothing to tell apart where nothing was timed.
    noise = [Text(resolution(frame))] if frame["total_s_per_sample"].notna().any() else []
    printed: list[RenderableType] = [*noise, Text(), memory.rich()] if whole else [memory.rich(), *noise]
    _remove(run_dir, PAGE_NAME)  # what an earlier report drew, and this one may not
    _write(run_dir, "memory_table", memory)
    plots.latency(frame, run_dir / "latency")
    plots.throughput(frame, run_dir / "throughput")
    if has_predictions(frame):
        (run_dir / "predicted.md").write_text(predicted_markdown(frame), encoding="utf-8")
        draw_predicted(frame, run_dir / "predicted")
    slopes = slope_table(frame)
    if len(slopes.frame):
        _write(run_dir, "slopes", slopes)
        printed += [Text(), slopes.rich()] if whole else []
    if has_gain(frame):
        gains = gain_table(frame)
        _write(run_dir, "gain", gains)
        printed += [Text(), gains.rich()] if whole else []
    if has_ranks(frame):
        _write(run_dir, "ranks", ranks_table(frame))
        scaling = scaling_table(frame)
        if len(scaling.frame):
            _write(run_dir, "scaling", scaling)
            draw_scaling(frame, run_dir / "scaling")
        planned = planned_table(frame, plans)
        if len(planned.frame):
            _write(run_dir, "planned_ranks", planned)
    draws_all = whole and len(frame) <= MAX_TIMELINES
    draw_timelines(frame if draws_all else largest_cases(frame), run_dir / TIMELINES_NAME)
    missing = missing_libraries()
    if missing:
        printed.append(Text(f"No page was written. It needs: pip install {' '.join(missing)}"))
    else:
        write_run_page([run_dir], run_dir / PAGE_NAME, with_paper=with_paper, loaded=[(records, frame)], plans=plans)
    return Group(*printed)


def remove_drawings(run_dir: Path) -> None:
    """Removes the tables, plots and pages of a run. Timelines and their pictures stay.

    Raises:
        OSError: one cannot be removed.
    """
    _remove(run_dir, PAGE_NAME, COMPARISON_NAME)


def _remove(run_dir: Path, *pages: str) -> None:
    tables = (f"{name}{suffix}" for name in _DRAWN for suffix in _FORMATS)
    for name in (*tables, *pages):
        (run_dir / name).unlink(missing_ok=True)


def _plans(plan_dir: Path) -> list[Record]:
    """The plans in a folder, of which some are of cases over ranks."""
    plans = read_plans(plan_dir)
    check_drawable(plan_dir, plans)
    _check_ranks(plan_dir, plans)
    return plans


def _check_ranks(folder: Path, records: Sequence[Record]) -> None:
    """Checks that a plan has something to show beside a run.

    Raises:
        RecordsError: there is no case over ranks in ``records``.
    """
    if all(at(record, "case.options.parallel.strategy") is None for record in records):
        raise RecordsError(f"'{folder}' has no case over ranks: a plan is laid beside a run for such cases alone.")


def check_drawable(run_dir: Path, records: Sequence[Record]) -> None:
    """Checks that ``records`` have the fields that every report needs.

    Raises:
        RecordsError: one lacks a field.
    """
    for record in records:
        missing = [f"case.{field}" for field in _DRAWN_FIELDS if at(record, f"case.{field}") is None]
        if missing:
            raise RecordsError(f"run '{run_dir}' cannot be drawn: record {record['case']['id']} lacks {missing[0]}.")


def _write(run_dir: Path, name: str, table: ReportTable) -> None:
    (run_dir / f"{name}.md").write_text(table.markdown(), encoding="utf-8")
    (run_dir / f"{name}.csv").write_text(table.csv(), encoding="utf-8")


def largest_cases(frame: pd.DataFrame) -> pd.DataFrame:
    """The measured row of each method and setting with the longest sequences, and of these the largest batch."""
    measured = frame[(frame["outcome"] == "ok").fillna(False).astype(bool)]
    ordered = measured.sort_values(["seq_len", "batch_size"], kind="stable")
    return ordered.drop_duplicates(["method", "setting"], keep="last").sort_index()


def draw_timelines(frame: pd.DataFrame, folder: Path) -> None:
    """Draws the timelines in ``folder`` of the cases in ``frame`` as .png and .svg beside their files.

    Args:
        frame: a frame of ``records_frame``.
        folder: the folder of the timelines; cases without one are left out.

    Raises:
        RecordsError: a file holds no timeline.
        OSError: the folder cannot be written.
    """
    from rlhfreports.columns import shared_axes_text
    from rlhfreports.timelines import draw_timeline

    for place, row in enumerate(frame.to_dict("records")):
        timeline = read_timeline(folder, row["case_id"])
        if timeline is None:
            continue
        title = f"{row['method_title']}, {row['seq_len']} tokens, batch {row['batch_size']}"
        draw_timeline(
            *timeline_frames(timeline),
            folder / str(row["case_id"]),
            title=title,
            caption=shared_axes_text(frame.iloc[[place]]),
        )
