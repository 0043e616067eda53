"""Draws a run again from its records alone: the memory table and the plots, written into the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rlhfbench.records.file import read_records
from rlhfbench.records.timelines import read_timeline, timeline_frames
from rlhfbench.runs.folder import TIMELINES_NAME

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import RenderableType


def draw_run(run_dir: Path, *, every_timeline: bool = False) -> RenderableType:
    """Draws what the records in ``run_dir`` hold, into that folder.

    ``memory_table`` (.md, .csv), ``latency`` and ``throughput`` (.png, .svg); ``slopes`` (.md, .csv) where some method
    was measured at two lengths or batch sizes; ``gain`` (.md, .csv) where the baseline was measured, and another method
    at two batch sizes; ``predicted`` (.md, .png, .svg) where memory was predicted too; and pictures of the timelines,
    where there are some, beside them.

    Args:
        run_dir: a folder with ``records.jsonl``.
        every_timeline: draw the timeline of every case, and not of the largest case of each method and setting alone.

    Returns:
        The memory table, and what follows from it in short, for a terminal.

    Raises:
        RecordsError: there are no records, or they cannot be read.
        OSError: the folder cannot be written.
    """
    records = read_records(run_dir)
    # pandas and matplotlib take most of a second to import, which `--help` does not wait for.
    from rich.console import Group

    from rlhfbench.records.frame import records_frame
    from rlhfreports.gain import gain_table, has_gain
    from rlhfreports.plots import draw_latency, draw_throughput
    from rlhfreports.predicted import draw_predicted, has_predictions, predicted_markdown
    from rlhfreports.slopes import slope_table
    from rlhfreports.table import memory_table

    frame = records_frame(records)
    table = memory_table(frame)
    printed = [table.rich()]
    _write(run_dir, "memory_table", table)
    draw_latency(frame, run_dir / "latency")
    draw_throughput(frame, run_dir / "throughput")
    if has_predictions(frame):
        (run_dir / "predicted.md").write_text(predicted_markdown(frame), encoding="utf-8")
        draw_predicted(frame, run_dir / "predicted")
    slopes = slope_table(frame)
    if len(slopes.frame):
        _write(run_dir, "slopes", slopes)
        printed.append(slopes.rich())
    if has_gain(frame):
        gains = gain_table(frame)
        _write(run_dir, "gain", gains)
        printed.append(gains.rich())
    draw_timelines(frame if every_timeline else largest_cases(frame), run_dir / TIMELINES_NAME)
    return Group(*printed)


class _Written(Protocol):
    """A table that is kept in a run's folder."""

    def markdown(self) -> str: ...

    def csv(self) -> str: ...


def _write(run_dir: Path, name: str, table: _Written) -> None:
    (run_dir / f"{name}.md").write_text(table.markdown(), encoding="utf-8")
    (run_dir / f"{name}.csv").write_text(table.csv(), encoding="utf-8")


def largest_cases(frame: pd.DataFrame) -> pd.DataFrame:
    """Of each method and setting the measured row with the longest sequences, and of those with the largest batch."""
    measured = frame[(frame["outcome"] == "ok").fillna(False).astype(bool)]
    ordered = measured.sort_values(["seq_len", "batch_size"], kind="stable")
    return ordered.drop_duplicates(["method", "setting"], keep="last").sort_index()


def draw_timelines(frame: pd.DataFrame, folder: Path) -> None:
    """Draws the timelines of the cases in ``frame`` that have one in ``folder``, as .png and .svg beside it.

    Args:
        frame: rows with ``case_id``, ``method_title``, ``seq_len``, ``batch_size`` and the axes of the captions.
        folder: where the timelines are.

    Raises:
        RecordsError: a file there holds no timeline.
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
