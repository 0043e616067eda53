"""``rlhfbench report``: draws a run again from its records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhfbench.cli.common import READING_CODES, draw, epilog, print_table
from rlhfbench.errors import RecordsError

EPILOG = epilog("rlhfbench report rlhfbench-run-20260101T120000Z", codes=READING_CODES)


def report(run_dir: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run.")]) -> None:
    """Draw a run again from its records.

    Prints how noisy the run was, the memory table, slopes and gain, and draws the timeline of every case.
    """
    from rlhfbench.records.file import read_records

    if not read_records(run_dir):
        raise RecordsError(f"run '{run_dir}' holds no records yet: there is nothing to draw.")
    print_table(draw(Path(run_dir), whole=True))
