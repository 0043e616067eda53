"""``rlhfbench models``: lists the model presets."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from rlhfbench.cli.common import epilog

EPILOG = epilog("rlhfbench models", "rlhfbench models --json")


def models(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """List the model presets.

    --model also takes a checkpoint folder, a .gguf file or a hub id.
    """
    from rlhfkernels.models.presets import PRESETS

    if as_json:
        print(json.dumps([dataclasses.asdict(preset) for preset in PRESETS.values()]))
        return
    width = max(map(len, PRESETS))
    for preset in PRESETS.values():
        print(f"{preset.name:<{width}}  {preset.model_type:<9} {preset.max_positions:>6} positions  {preset.source}")
