"""``rlhfbench run``: runs a sweep and draws its report."""

from __future__ import annotations

import dataclasses
import datetime
import json
import shlex
import signal
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhfbench.cli import common, ranks
from rlhfbench.cli.common import (
    DONE,
    INTERRUPTED,
    NOTHING,
    case_spec,
    draw,
    epilog,
    given,
    number,
    path_text,
    print_table,
)
from rlhfbench.errors import RecordsError, SweepError
from rlhfbench.launch import find_launch
from rlhfbench.records.schema import OUTCOMES
from rlhfbench.runs.options import RunOptions
from rlhfkernels.naming import unknown

if TYPE_CHECKING:
    from rlhfbench.cluster.place import Cluster
    from rlhfbench.runs.max_batch import MaxBatchResult
    from rlhfbench.runs.runner import RunResult

MEASUREMENT, OUTPUT, CLUSTER = "Measurement", "Output", "Cluster"
EPILOG = epilog(
    "rlhfbench run",
    "rlhfbench run --model gpt2 --methods lora,hydra --seq-lens 256,512",
    "rlhfbench run --methods dpo --world-size 1,2 --parallel fsdp",
    "rlhfbench run --sweep sweep.toml --option engine.gradient_checkpointing=true",
    "rlhfbench run --model opt-1.3b --device cuda --ray 10.0.0.1:6379",
    "rlhfbench run --resume rlhfbench-run-20260101T120000Z --retry crashed",
)
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(RunOptions)}
_RETRIED = OUTCOMES[1:]  # all but ok


def run(
    ctx: typer.Context,
    model: common.Model = None,
    methods: common.Methods = None,
    seq_lens: common.SeqLens = None,
    batch_sizes: common.BatchSizes = None,
    sweep: common.SweepFile = None,
    setting: common.Setting = None,
    prompt_fraction: common.PromptFraction = None,
    seed: common.Seed = None,
    option: common.Option = None,
    prompts: common.Prompts = None,
    prompt_field: common.PromptField = None,
    demonstrations: common.Demonstrations = None,
    pairs: common.Pairs = None,
    device: common.Device = None,
    dtype: common.Dtype = None,
    lora_rank: common.LoraRank = None,
    world_size: ranks.WorldSize = None,
    parallel: ranks.Parallel = None,
    zero_stage: ranks.ZeroStage = None,
    global_batch: ranks.GlobalBatch = False,
    time_budget_s: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            parser=number("--time-budget-s", float),
            rich_help_panel=MEASUREMENT,
            help="Seconds for timing the steps of a case, over all its blocks."
            f"  [default: {_DEFAULTS['time_budget_s']:g}]",
        ),
    ] = None,
    blocks: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=number("--blocks", int),
            rich_help_panel=MEASUREMENT,
            help="Blocks that a case is timed in, each in a new process, all cases' in random order. One block gives no"
            " interval.  [default: 4, or 1 where building takes over 10 s]",
        ),
    ] = None,
    case_timeout_s: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            parser=number("--case-timeout-s", float),
            rich_help_panel=MEASUREMENT,
            help=f"Seconds after which a case is killed.  [default: {_DEFAULTS['case_timeout_s']:g}]",
        ),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=MEASUREMENT,
            help="Memory that a case may allocate: 4GiB. No limit by default.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=number("--threads", int),
            rich_help_panel=MEASUREMENT,
            help="Threads of torch in a case; torch chooses by default.",
        ),
    ] = None,
    profile: Annotated[
        bool | None,
        typer.Option(
            "--profile/--no-profile",
            rich_help_panel=MEASUREMENT,
            help="Trace each phase, into the folder DIR/traces.  [default: no]",
        ),
    ] = None,
    with_plan: Annotated[
        bool | None,
        typer.Option(
            "--with-plan/--no-with-plan",
            rich_help_panel=MEASUREMENT,
            help="Predict the memory of each case too.  [default: no]",
        ),
    ] = None,
    max_batch: Annotated[
        bool,
        typer.Option(
            "--max-batch",
            rich_help_panel=MEASUREMENT,
            help="Find the largest batch that runs, for every method and length.",
        ),
    ] = False,
    max_batch_limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=number("--max-batch-limit", int),
            rich_help_panel=MEASUREMENT,
            help="Largest batch that --max-batch tries.  [default: 512]",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            rich_help_panel=CLUSTER,
            help="Run the cases on a Ray cluster: HOST:PORT of its head, local for one of this machine alone, or none.",
        ),
    ] = None,
    ray_group: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=CLUSTER,
            help="Cases that stay on one machine, so that their times compare: sweep (all of them), model, size (one "
            "model, lengths and batch) or case (none).  [default: sweep]",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            parser=path_text("--out"),
            rich_help_panel=OUTPUT,
            help="Folder of the run; a new one by default.",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            parser=path_text("--resume"),
            rich_help_panel=OUTPUT,
            help="Continue the run in DIR, with its cases and settings; options that are given win over these.",
        ),
    ] = None,
    retry: Annotated[
        str | None,
        typer.Option(
            metavar="OUTCOMES",
            rich_help_panel=OUTPUT,
            help=f"With --resume, run cases of these outcomes again: {', '.join(_RETRIED)}.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print the records as a JSON list.")
    ] = False,
) -> int:
    """Run a sweep and draw its report.

    Without options: the PPO methods on a tiny model, in about three minutes on two CPU cores.
    """
    from rlhfbench.cases.sizes import parse_size
    from rlhfbench.runs import environment

    environment.check_system()  # first: the runner imports modules that Windows lacks
    launch = find_launch()
    if launch is not None:
        from rlhfbench.runs.head import head

        if launch.rank:
            from rlhfbench.runs.runner import follow_launcher

            follow_launcher()
            return DONE
        ctx.call_on_close(head().end)  # whatever becomes of the run, the others end
    from rlhfbench.runs import runner
    from rlhfbench.runs.folder import RunFolder

    if resume is not None and out is not None:
        raise SweepError([f"--out is {out!r}: it must be left out, since --resume names the folder of the run."])
    if retry is not None and resume is None:
        raise SweepError([f"--retry is {retry!r}: it needs --resume DIR."])
    retried = _outcomes(retry)
    spec = case_spec(ctx.params)
    values = given(
        time_budget_s=time_budget_s,
        blocks=blocks,
        case_timeout_s=case_timeout_s,
        num_threads=threads,
        memory_limit_bytes=None if memory_limit is None else parse_size("--memory-limit", memory_limit),
        profile=profile,
        with_plan=with_plan,
    )
    out_dir = Path(resume or out or f"rlhfbench-run-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}")
    settings: dict[str, Any] = {}
    if resume is not None:
        folder = RunFolder(out_dir)
        folder.check_is_run()
        settings = folder.settings()
    recorded_limit = settings.get("max_batch_limit")
    max_batch = max_batch or recorded_limit is not None
    if max_batch_limit is not None and not max_batch:
        raise SweepError(["--max-batch-limit needs --max-batch."])
    options = RunOptions.recorded({**settings, **values})
    place = _place(ray, ray_group, settings, max_batch=max_batch)
    defines_cases = spec or any(value is not None for value in (sweep, setting, world_size, parallel, zero_stage))
    if resume is not None and not defines_cases:
        cases = folder.load_sweep()
    else:
        cases = ranks.make_ranked_sweep(spec, sweep, setting, ctx.params)
    if place is not None:
        place.check(cases.cases)
    how: dict[str, Any] = {"resume": resume is not None, "retry": retried}
    # SIGTERM ends a run as Ctrl-C does: the records are whole, and the command that resumes is printed.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if max_batch:
            from rlhfbench.runs.max_batch import find_max_batches

            limit = recorded_limit if max_batch_limit is None else max_batch_limit
            return _finish(*find_max_batches(cases, out_dir, options, **given(limit=limit), **how), as_json=as_json)
        with place or nullcontext() as cluster:
            result = runner.run_sweep(cases, out_dir, options, place=cluster, **how)
    except RecordsError as error:
        if not isinstance(error.__cause__, OSError):  # a malformed record: the same command would find it again
            raise
        raise RecordsError(f"{error}\nTo resume: {_resume_command(out_dir)}") from error
    finally:
        signal.signal(signal.SIGTERM, before)
    return _finish(result, as_json=as_json)


def _place(ray: str | None, group: str | None, settings: Mapping[str, Any], *, max_batch: bool) -> Cluster | None:
    """The cluster that runs the cases; ``None`` for this machine.

    Args:
        ray: --ray.
        group: --ray-group.
        settings: those of the run to resume.
        max_batch: the largest batches are searched for.
    """
    address = ray or settings.get("ray")
    if address is None or address == "none":
        if group is not None:
            raise SweepError([f"--ray-group is {group!r}: it needs --ray ADDRESS."])
        return None
    if max_batch:
        raise SweepError([f"--ray is {address!r}: --max-batch tries one batch after the other, on this machine alone."])
    from rlhfbench.cluster.place import Cluster

    return Cluster(address, group or settings.get("ray_group") or "sweep")


def _outcomes(text: str | None) -> list[str]:
    """The outcomes of --retry."""
    names = [] if text is None else [name.strip() for name in text.split(",")]
    wrong = [unknown("--retry", name, _RETRIED) for name in names if name not in _RETRIED]
    if wrong:
        raise SweepError(wrong)
    return names


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
