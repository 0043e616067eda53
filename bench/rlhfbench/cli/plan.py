"""``rlhfbench plan``: predicts the memory of a sweep's cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rlhfbench.cli import common, ranks
from rlhfbench.cli.common import READING_CODES, case_spec, epilog, path_text, print_table
from rlhfbench.files import check_writable

OUTPUT = "Output"
EPILOG = epilog(
    "rlhfbench plan --model gpt2 --gpu a100-80gb",
    "rlhfbench plan --model tiny --device cpu --methods hydra --json",
    "rlhfbench plan --model llama-7b --gpu h200 --zero-stage 2,3 --world-size 8",
    "rlhfbench plan --model tiny --device cpu --parallel fsdp --world-size 2",
    codes=READING_CODES,
)


def plan(
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
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=common.HARDWARE,
            help="An accelerator (a100-80gb) or a size: 24GiB. None by default.",
        ),
    ] = None,
    world_size: ranks.WorldSize = None,
    parallel: ranks.Parallel = None,
    zero_stage: ranks.ZeroStage = None,
    global_batch: ranks.GlobalBatch = False,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            parser=path_text("--out"),
            rich_help_panel=OUTPUT,
            help="Folder for the picture and the JSON.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print the plans as a JSON list.")
    ] = False,
) -> None:
    """Predict memory, with no device and no weights.

    Runs one training step on fake tensors, which have shapes and no contents.
    """
    from rlhfbench.cli import plan_output
    from rlhfbench.planning import plans as planning

    if out is not None:
        check_writable("out", Path(out))

    # A plan is for an accelerator unless the command says otherwise; a sweep file usually names the device of a run.
    spec = case_spec(ctx.params) | {"device": device or "cuda"}
    cases = ranks.make_ranked_sweep(spec, sweep, setting, ctx.params)
    planned = planning.plan(
        cases,
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
