"""``rlhfbench plan``: predicts the memory of a sweep's cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rlhfbench.cli.cases import CaseOptions
from rlhfbench.cli.common import HARDWARE, epilog, path_text, print_table
from rlhfbench.cli.groups import with_groups
from rlhfbench.cli.ranks import RankOptions, make_ranked_sweep
from rlhfbench.errors import RunFolderError
from rlhfbench.files import check_writable
from rlhfbench.launch import refuse_launcher

OUTPUT = "Output"
EPILOG = epilog(
    "rlhfbench plan --model gpt2 --gpu a100-80gb",
    "rlhfbench plan --model tiny --device cpu --methods hydra --json",
    "rlhfbench plan --model llama-7b --gpu h200 --zero-stage 2,3 --world-size 8",
    "rlhfbench plan --model tiny --device cpu --parallel fsdp --world-size 2",
    codes="Exit codes: 0 done, 2 the command is wrong, 3 a worker process died, 130 interrupted.",
)


@with_groups
def plan(
    *,
    cases: CaseOptions,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=HARDWARE,
            help="An accelerator (a100-80gb) or a size: 24GiB. None by default.",
        ),
    ] = None,
    ranks: RankOptions,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            parser=path_text("--out"),
            rich_help_panel=OUTPUT,
            help="Folder for plan.json, pictures and timelines.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print the plans as a JSON list.")
    ] = False,
) -> None:
    """Predict memory, with no device and no weights.

    Runs one training step on fake tensors, which have shapes and no contents.
    """
    refuse_launcher("rlhfbench plan")
    from rlhfbench.cli import plan_output
    from rlhfbench.planning import plans as planning
    from rlhfbench.runs.folder import RunFolder

    if out is not None:
        check_writable("out", Path(out))
        if RunFolder(out).is_run:
            raise RunFolderError(f"out '{out}' holds a run, whose timelines a plan would replace: name another folder.")

    # A plan is for an accelerator unless the command says otherwise; a sweep file usually names the device of a run.
    spec = {"device": "cuda"} | cases.spec()
    planned = planning.plan(
        make_ranked_sweep(spec, cases.sweep, cases.setting, ranks),
        gpu=gpu,
        with_timeline=out is not None,
        meanwhile=(lambda: None) if as_json and out is None else plan_output.import_libraries,
    )
    objects = planning.plan_objects(planned, gpu)
    if as_json:
        print(json.dumps(objects))
    else:
        print_table(plan_output.table(objects, gpu))
        for sentence in plan_output.advice(objects):
            print(sentence)
    if out is not None:
        timelines = {item.plan.case.id: item.plan.timeline for item in planned if item.plan.timeline is not None}
        plan_output.write(objects, gpu, Path(out), timelines)
