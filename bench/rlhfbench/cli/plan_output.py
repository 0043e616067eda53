"""The outputs of ``rlhfbench plan``: a table, a picture, JSON and advice."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfbench.cases.settings import setting_of
from rlhfbench.cli.common import needing_packages
from rlhfbench.errors import RunFolderError
from rlhfbench.planning.devices import find_accelerator
from rlhfbench.planning.max_batch import MAX_BATCH_SIZE
from rlhfbench.records.derived import options_text, strategy
from rlhfbench.records.plans import PLAN_NAME
from rlhfbench.records.timelines import write_timeline
from rlhfbench.runs.folder import TIMELINES_NAME
from rlhfkernels.methods.table import METHODS

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import RenderableType


def frame(plans: list[dict[str, Any]]) -> pd.DataFrame:
    """The data frame that ``rlhfreports.plans`` draws: one row a plan."""
    import pandas as pd

    from rlhfreports.columns import with_short_options
    from rlhfreports.ranks import other_options

    rows = pd.DataFrame(
        [
            {
                "title": METHODS[plan["case"]["method"]].title,
                "model": plan["case"]["model"],
                "setting": setting_of(plan["case"]["options"]),
                "lora_rank": plan["case"]["options"]["lora"]["r"],
                "options": other_options(options_text(plan)),
                "strategy": strategy(plan),
                "world_size": plan["zero"]["world_size"],
                "seq_len": plan["case"]["prompt_len"] + plan["case"]["completion_len"],
                "batch_size": plan["case"]["batch_size"],
                **{f"{part}_part_bytes": size for part, size in plan["memory"]["parts"].items()},
                **{f"{name}_bytes": plan["memory"][f"{name}_bytes"] for name in ("model", "activation", "total")},
                "peak_phase": plan["memory"]["peak_phase"],
                "fits": plan["fits"],
                "max_batch_size": plan["max_batch_size"],
                "floor_s_per_sample": plan["floor"]["total_s_per_sample"],
            }
            for plan in plans
        ]
    )
    return with_short_options(rows)


@needing_packages("the plan")
def import_libraries() -> None:
    """Imports what the outputs are drawn with: 0.6 s on their own, and none beside other processes.

    Raises:
        RunFolderError: a package is missing.
    """
    for name in ("rich.console", "rlhfbench.records.frame", "rlhfreports.plans"):
        importlib.import_module(name)


@needing_packages("the plan")
def table(plans: list[dict[str, Any]], gpu: str | None) -> RenderableType:
    """The plans as a table for the terminal.

    Raises:
        RunFolderError: a package is missing.
    """
    from rlhfreports.plans import plan_table

    return plan_table(frame(plans), caption=_caption(plans, gpu), max_batch_limit=MAX_BATCH_SIZE)


def advice(plans: list[dict[str, Any]]) -> list[str]:
    """The advice for cases that do not fit even with one data row, each sentence once, with the model among several."""
    found = [(plan["case"]["model"], plan["advice"]) for plan in plans if plan["advice"] is not None]
    several = len({plan["case"]["model"] for plan in plans}) > 1
    return list(dict.fromkeys(f"{model}: {sentence}" if several else sentence for model, sentence in found))


@needing_packages("the plan")
def write(
    plans: list[dict[str, Any]], gpu: str | None, folder: Path, timelines: dict[str, dict[str, Any]] | None = None
) -> None:
    """Writes ``plan.json``, ``plan.png``, ``plan.svg`` and a folder of timelines, drawn for the first 100 cases.

    Args:
        plans: from ``plan_objects``.
        gpu: the accelerator that they were made for; its memory is drawn as a line.
        folder: where they go.
        timelines: bytes over time, by case id.

    Raises:
        RunFolderError: the folder cannot be written, or a package is missing.
        RecordsError: a timeline cannot be written.
    """
    from rlhfbench.records.frame import records_frame
    from rlhfbench.runs.drawing import MAX_TIMELINES, draw_timelines
    from rlhfreports.plans import draw_plan

    timelines_dir = folder / TIMELINES_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / PLAN_NAME).is_file() and timelines_dir.is_dir():
            shutil.rmtree(timelines_dir)  # an older plan's, of which those of other cases would stay
        (folder / PLAN_NAME).write_text(json.dumps(plans, indent=1) + "\n", encoding="utf-8")
        limit = None if gpu is None else find_accelerator(gpu)
        draw_plan(
            frame(plans),
            folder / "plan",
            caption=_caption(plans, gpu),
            limit_bytes=None if limit is None else limit.memory_bytes,
        )
        for case_id, timeline in (timelines or {}).items():
            write_timeline(timelines_dir, case_id, timeline)
        draw_timelines(records_frame(plans).head(MAX_TIMELINES), timelines_dir)
    except OSError as error:
        raise RunFolderError(f"out '{folder}' cannot be written: {error.strerror}.") from error


def _caption(plans: list[dict[str, Any]], gpu: str | None) -> str:
    from rlhfbench.records.frame import records_frame
    from rlhfreports.columns import shared_axes_text
    from rlhfreports.plans import limit_text
    from rlhfreports.ranks import other_options

    # Left out: in a plan the device only decides the block size of storages, and ranks are told apart in words.
    rows = records_frame(plans).assign(device="")
    words = [shared_axes_text(rows.assign(options=[other_options(text) for text in rows["options"]]))]
    shared = frame(plans)[["strategy", "world_size"]].drop_duplicates()
    if len(shared) == 1 and shared["strategy"].iloc[0]:
        words.append(f"{shared['strategy'].iloc[0]}, one rank of {shared['world_size'].iloc[0]}")
    if gpu is not None:
        limit = find_accelerator(gpu)
        reserve = limit.reserve_bytes / 2**30
        words.append(f"{limit.name}: {limit_text(limit.memory_bytes)}, {reserve:.1f} of it reserved (an estimate)")
    return " · ".join(word for word in words if word)
