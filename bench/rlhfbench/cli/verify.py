"""``rlhfbench verify``: compares a model's numbers here with those of transformers and PEFT."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Annotated

import typer

from rlhfbench.cli import common
from rlhfbench.cli.common import DONE, NO, epilog, print_table
from rlhfbench.errors import SweepError
from rlhfbench.launch import refuse_launcher

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import RenderableType

    from rlhfkernels.engine.verify import Check

EPILOG = epilog(
    "rlhfbench verify --model tiny",
    "rlhfbench verify --model ./my-model --dtype bfloat16 --device cuda",
    codes="Exit codes: 0 every check that can run is within its tolerance, 1 a check is not, 2 the command is wrong, "
    "130 interrupted.",
)


def verify(
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel=common.CASES,
            help="Preset, checkpoint folder, .gguf file or Hugging Face model id.",
        ),
    ],
    device: common.Device = None,
    dtype: common.Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as a JSON list.")] = False,
) -> int:
    """Compare a model's numbers with transformers and PEFT.

    A few tokens go through every trunk and backend: log-probabilities, left-padded rows, cached decoding, adapters and
    their gradients.
    """
    refuse_launcher("rlhfbench verify")
    from rlhfbench.cases import preflight
    from rlhfbench.cases.sweep import Sweep
    from rlhfbench.records.json_files import finite
    from rlhfbench.runs.worker import is_out_of_memory

    spec = {"models": [model], "methods": ["sft-lora"], "seq_lens": [2], "batch_sizes": [1]}
    chosen = common.given(device=device, dtype=dtype)
    preflight.check(Sweep.from_spec(spec | chosen))
    # Read when tqdm is imported: loading a GGUF file draws a bar that transformers cannot switch off.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging

    from rlhfkernels.engine import verify as engine
    from rlhfkernels.models.errors import running_errors

    logging.disable_progress_bar()
    try:
        with running_errors([model]):
            checks = engine.verify(model, **chosen)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        where = device or common.CASE_DEFAULTS["device"]
        raise SweepError(
            [f"model {model!r} is too large for device {where!r}: its memory must hold two copies of the model."]
        ) from error
    if as_json:
        print(json.dumps([finite(dataclasses.asdict(check)) for check in checks], allow_nan=False))
    else:
        print_table(table(checks))
        for note in dict.fromkeys(check.note for check in checks if check.note is not None):
            print(note)
    return NO if any(check.outcome == "wrong" for check in checks) else DONE


def table(checks: Sequence[Check]) -> RenderableType:
    """One row a check."""
    from rlhfreports.layouts import Column
    from rlhfreports.terminal import terminal

    def numbers(values: Iterable[float | None]) -> list[str]:
        return ["" if value is None else f"{value:.1e}" for value in values]

    return terminal(
        "",
        [
            Column(heading="check", cells=[check.name for check in checks], is_word=True),
            Column(heading="largest error", cells=numbers(check.error for check in checks), short="error"),
            Column(heading="tolerance", cells=numbers(check.tolerance for check in checks)),
            Column(heading="outcome", cells=[check.outcome for check in checks], is_word=True),
        ],
    )
