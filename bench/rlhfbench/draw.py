"""Draws a run again from its records alone: the memory table and the plots, written into the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhfbench.records import read_records

if TYPE_CHECKING:
    from rich.console import RenderableType


def draw_run(run_dir: Path) -> RenderableType:
    """Writes ``memory_table`` (.md, .csv), ``latency`` and ``throughput`` (.png, .svg) into ``run_dir``.

    Args:
        run_dir: a folder with ``records.jsonl``.

    Returns:
        The memory table, for a terminal.

    Raises:
        RecordsError: there are no records, or they cannot be read.
        OSError: the folder cannot be written.
    """
    records = read_records(run_dir)
    # pandas and matplotlib take most of a second to import, which `--help` does not wait for.
    from rlhfbench.frame import records_frame
    from rlhfreports.plots import draw_latency, draw_throughput
    from rlhfreports.table import memory_table

    frame = records_frame(records)
    table = memory_table(frame)
    (run_dir / "memory_table.md").write_text(table.markdown(), encoding="utf-8")
    (run_dir / "memory_table.csv").write_text(table.csv(), encoding="utf-8")
    draw_latency(frame, run_dir / "latency")
    draw_throughput(frame, run_dir / "throughput")
    return table.rich()
