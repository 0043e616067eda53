"""``rlhfbench run``: runs a sweep and draws its report."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhfbench.cli.cases import CaseOptions
from rlhfbench.cli.common import (
    DONE,
    INTERRUPTED,
    NOTHING,
    draw,
    ended_by_sigterm,
    epilog,
    print_table,
)
from rlhfbench.cli.groups import with_groups
from rlhfbench.cli.ranks import RankOptions, make_ranked_sweep
from rlhfbench.cli.run_options import OUTPUT, ClusterOptions, FolderOptions, MeasurementOptions
from rlhfbench.errors import RecordsError
from rlhfbench.launch import find_launch

if TYPE_CHECKING:
    from rlhfbench.runs.max_batch import MaxBatchResult
    from rlhfbench.runs.runner import RunResult

EPILOG = epilog(
    "rlhfbench run",
    "rlhfbench run --model gpt2 --methods lora,hydra --seq-lens 256,512",
    "rlhfbench run --methods dpo --world-size 1,2 --parallel fsdp",
    "rlhfbench run --sweep sweep.toml --option engine.gradient_checkpointing=true",
    "rlhfbench run --model opt-1.3b --device cuda --ray 10.0.0.1:6379",
    "rlhfbench run --resume rlhfbench-run-20260101T120000Z --retry crashed",
)


@with_groups
def run(
    *,
    ctx: typer.Context,
    cases: CaseOptions,
    ranks: RankOptions,
    measurement: MeasurementOptions,
    cluster: ClusterOptions,
    folder: FolderOptions,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            rich_help_panel=OUTPUT,
            help="Print the records as a JSON list; with --max-batch, the largest batches.",
        ),
    ] = False,
) -> int:
    """Run a sweep and draw its report.

    Without options: the PPO methods on a tiny model, in three to four minutes on two CPU cores.
    """
    from rlhfbench.runs import environment

    environment.check_system()  # first: the runner imports modules that Windows lacks
    launch = find_launch()
    if launch is not None:
        from rlhfbench.runs.leader import leader

        if launch.rank:
            from rlhfbench.runs.runner import follow_launcher

            follow_launcher()
            return DONE
        ctx.call_on_close(leader().end)  # whatever becomes of the run, the others end
    from rlhfbench.runs import runner
    from rlhfbench.runs.folder import RunFolder

    run_dir = folder.folder()
    how: dict[str, Any] = {"resume": folder.resume is not None, "retry": folder.retried()}
    settings: dict[str, Any] = {}
    if folder.resume is not None:
        RunFolder(run_dir).check_is_run()
        settings = RunFolder(run_dir).settings()
    limit = measurement.batch_limit(settings)
    options = measurement.options(settings)
    place = cluster.place(settings, searches=limit is not None)
    spec = cases.spec()
    if folder.resume is not None and not (spec or cases.sweep or cases.setting or ranks.define_cases):
        sweep = RunFolder(run_dir).load_sweep()
    else:
        launched = None if launch is None else launch.size
        sweep = make_ranked_sweep(spec, cases.sweep, cases.setting, ranks, launched=launched)
    if place is not None:
        place.check(sweep.cases)
    with ended_by_sigterm(), _saying_how_to_resume(run_dir):
        if limit is not None:
            from rlhfbench.runs.max_batch import find_max_batches

            return _finish(*find_max_batches(sweep, run_dir, options, limit=limit, **how), as_json=as_json)
        with place or nullcontext() as nodes:
            result = runner.run_sweep(sweep, run_dir, options, place=nodes, **how)
    return _finish(result, as_json=as_json)


@contextmanager
def _saying_how_to_resume(run_dir: Path) -> Iterator[None]:
    """Adds the command that resumes to the error of a record that could not be written."""
    try:
        yield
    except RecordsError as error:
        if not isinstance(error.__cause__, OSError):  # a malformed record: the same command would find it again
            raise
        raise RecordsError(f"{error}\nTo resume: {_resume_command(run_dir)}") from error


def _finish(result: RunResult, found: list[MaxBatchResult] | None = None, *, as_json: bool) -> int:
    """Draws a run, prints its table or JSON, and returns the exit code.

    Args:
        result: the run.
        found: the largest batches, printed in place of the records.
        as_json: print JSON and not a table.
    """
    if result.interrupted:
        print(f"Interrupted: {len(result.records)} cases are recorded in {result.run_dir}.", file=sys.stderr)
        print(f"To resume: {_resume_command(result.run_dir)}", file=sys.stderr)
        return INTERRUPTED
    table = draw(result.run_dir)
    if as_json:
        print(json.dumps(result.records if found is None else [entry.to_dict() for entry in found]))
    elif found is None:
        print_table(table)
    else:
        from rlhfbench.runs.max_batch import max_batch_frame
        from rlhfreports.max_batch import max_batch_table

        print_table(max_batch_table(max_batch_frame(found)))
    print(f"The run is in {result.run_dir}.", file=sys.stderr)
    if not result.num_ok:
        print("Nothing could be measured: no case is ok.", file=sys.stderr)
        return NOTHING
    return DONE


def _resume_command(out_dir: Path) -> str:
    """The command that continues the run; its cases and settings are in the folder."""
    return shlex.join(["rlhfbench", "run", "--resume", str(out_dir)])
