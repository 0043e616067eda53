"""``rlhfbench models``: lists the model presets."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from rlhfbench.cli.common import READING_CODES, epilog, print_table

EPILOG = epilog("rlhfbench models", "rlhfbench models --json", codes=READING_CODES)


def models(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """List the model presets.

    --model also takes a checkpoint folder, a .gguf file or a Hugging Face model id.
    """
    from rlhfkernels.models.presets import PRESETS

    if as_json:
        print(json.dumps([dataclasses.asdict(preset) for preset in PRESETS.values()]))
        return
    from rlhfreports.layouts import Column
    from rlhfreports.terminal import terminal

    presets = PRESETS.values()
    columns = [
        Column(heading="model", cells=[preset.name for preset in presets], is_word=True),
        Column(heading="type", cells=[preset.model_type for preset in presets], is_word=True),
        Column(heading="positions", cells=[str(preset.max_positions) for preset in presets]),
        Column(heading="source", cells=[preset.source for preset in presets], is_word=True),
    ]
    print_table(terminal("", columns))
