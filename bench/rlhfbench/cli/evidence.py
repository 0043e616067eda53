"""``rlhfbench evidence``: collects everything worth knowing about the device at hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from rlhfbench.cli import common
from rlhfbench.cli.common import DONE, NOTHING, ended_by_sigterm, epilog, number, path_text
from rlhfbench.errors import SweepError
from rlhfbench.launch import refuse_launcher
from rlhfbench.packages import check_packages

WORK, OUTPUT = "What is done", "Output"
EPILOG = epilog(
    "rlhfbench evidence --out my-evidence",
    "rlhfbench evidence --out cpu-evidence --device cpu --budget-min 4",
    "rlhfbench evidence --out my-evidence --parts 3,5",
    codes="Exit codes: 0 all parts are done, 2 the command is wrong, 3 some part is not done, 130 interrupted.",
)
_MAX_BUDGET_MIN = 24 * 60


def evidence(
    out: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            parser=path_text("--out"),
            rich_help_panel=OUTPUT,
            help="Folder for the results: a new one, or one to resume.",
        ),
    ],
    budget_min: Annotated[
        float,
        typer.Option(
            metavar="X",
            parser=number("--budget-min", float),
            rich_help_panel=WORK,
            help="Limit for all parts together, in minutes.",
            show_default=True,
        ),
    ] = 25.0,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=common.CASES,
            help="Preset, checkpoint folder, .gguf file or Hugging Face model id."
            "  [default: llama-7b on CUDA, tiny on a CPU]",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=common.HARDWARE,
            help="cpu, cuda or cuda:N.  [default: cuda where there is a device, else cpu]",
        ),
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(metavar="N,...", rich_help_panel=WORK, help="Numbers of the parts, 1 to 7; all by default."),
    ] = None,
    blocks: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=number("--blocks", int),
            rich_help_panel=WORK,
            help="Blocks of each case of part 3; several give its seconds an interval.  [default: 1; 4 on a CPU]",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print the outcomes as JSON.")
    ] = False,
) -> int:
    """Check and measure a device, and write one report.

    Runs seven parts of at most 8 minutes each. A part that fails does not stop the next one. With the same folder, the
    command resumes.
    """
    refuse_launcher("rlhfbench evidence")
    problem = check_packages()
    if problem is not None:
        raise SweepError([problem])
    from rlhfbench.evidence.parts import PARTS
    from rlhfbench.evidence.request import Request, parse_parts
    from rlhfbench.runs.options import RunOptions

    if not 0 < budget_min <= _MAX_BUDGET_MIN:
        raise SweepError([f"--budget-min is {budget_min:g}: it must be above 0 and at most {_MAX_BUDGET_MIN}."])
    if blocks is not None:
        RunOptions(blocks=blocks)  # checks it
    numbers = parse_parts(parts, PARTS)
    request = Request.of(model, device, blocks)
    from rlhfbench.cases import preflight
    from rlhfbench.cases.sweep import Sweep
    from rlhfbench.evidence.collect import EVIDENCE_NAME, REPORT_NAME, collect
    from rlhfbench.runs import environment

    environment.check_system()
    lengths = request.sizes.seq_lens if 4 in numbers else ()  # part 4 has longer sequences than the others
    preflight.check(Sweep(cases=(request.case("hydra"), *(request.case("hydra", seq_len=each) for each in lengths))))
    with ended_by_sigterm():
        found = collect(Path(out), request, numbers, 60 * budget_min)
    outcomes = {number: found["parts"][str(number)]["outcome"] for number in numbers}
    if as_json:
        print(json.dumps({"parts": found["parts"]}))
    else:
        print((Path(out) / REPORT_NAME).read_text(encoding="utf-8"))
    print(f"The report is {Path(out) / REPORT_NAME}, the outcomes are in {EVIDENCE_NAME} beside it.", file=sys.stderr)
    return DONE if set(outcomes.values()) == {"done"} else NOTHING
