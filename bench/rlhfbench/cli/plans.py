"""What ``rlhfbench plan`` does: a plan for every case of a sweep, as a table, a picture, JSON and advice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfbench.cases import preflight
from rlhfbench.cases.settings import setting_of
from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import RunFolderError
from rlhfbench.planning.devices import find_accelerator
from rlhfbench.planning.max_batch import plan_kinds
from rlhfbench.records.timelines import write_timeline
from rlhfbench.runs.folder import TIMELINES_NAME
from rlhfkernels.methods.table import METHODS

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table


def make_plans(
    sweep: Sweep,
    *,
    gpu: str | None,
    zero: dict[str, Any],
    global_batch: bool = False,
    timelines: dict[str, dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """One object a case, of one rank, with the keys of ``rlhfbench.planning.predict.plan_object``.

    Args:
        sweep: the cases.
        gpu: an accelerator's name or a size; ``None`` leaves open what fits.
        zero: the fields of ``Zero``.
        global_batch: whether the batch sizes are over all ranks, not of one.
        timelines: is given the timeline of each case, by its id; without it none is kept.

    Raises:
        SweepError: a model, a length, the accelerator or the division among ranks is wrong; every problem is named.
    """
    from rlhfbench.planning.zero import Zero, cases_of_a_rank

    accelerator = None if gpu is None else find_accelerator(gpu)
    ranks = Zero(**zero)
    preflight.check_models(sweep)
    cases = cases_of_a_rank(sweep.cases, ranks.world_size) if global_batch else sweep.cases
    usable_bytes = None if accelerator is None else accelerator.usable_bytes
    plans = plan_kinds(cases, ranks, usable_bytes=usable_bytes, with_timeline=timelines is not None)

    from rlhfbench.planning import advice
    from rlhfbench.planning.predict import plan_object

    found = []
    for planned in plans:
        words = None
        if accelerator is not None and planned.of_one is not None:
            words = advice.advice(planned.of_one, accelerator)
        found.append(plan_object(planned.plan, accelerator, planned.max_batch_size, words))
        if timelines is not None and planned.plan.timeline is not None:
            timelines[planned.plan.case.id] = planned.plan.timeline
    return found


def frame(plans: list[dict[str, Any]]) -> pd.DataFrame:
    """The table that crosses to the reports: see ``rlhfreports.plans``."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "title": METHODS[plan["case"]["method"]].title,
                "setting": setting_of(plan["case"]["options"]),
                "seq_len": plan["case"]["prompt_len"] + plan["case"]["completion_len"],
                "batch_size": plan["case"]["batch_size"],
                **{f"{part}_part_bytes": size for part, size in plan["memory"]["parts"].items()},
                **{f"{name}_bytes": plan["memory"][f"{name}_bytes"] for name in ("model", "activation", "total")},
                "bucket_bytes": plan["zero"]["bucket_bytes"],
                "peak_phase": plan["memory"]["peak_phase"],
                "fits": plan["fits"],
                "max_batch_size": plan["max_batch_size"],
                "floor_s_per_sample": plan["floor"]["total_s_per_sample"],
            }
            for plan in plans
        ]
    )


def table(plans: list[dict[str, Any]], gpu: str | None) -> Table:
    """The plans for the terminal."""
    from rlhfreports.plans import plan_table

    return plan_table(frame(plans), caption=_caption(plans, gpu))


def advice(plans: list[dict[str, Any]]) -> list[str]:
    """What would help the cases that do not fit even with one sequence, each sentence once."""
    return list(dict.fromkeys(plan["advice"] for plan in plans if plan["advice"] is not None))


def write(
    plans: list[dict[str, Any]], gpu: str | None, folder: Path, timelines: dict[str, dict[str, Any]] | None = None
) -> None:
    """Writes ``plan.json``, ``plan.png`` and ``plan.svg``, and the ``timelines`` by case id into a folder beside them.

    Raises:
        RunFolderError: the folder cannot be written.
        RecordsError: a timeline cannot be written.
    """
    from rlhfbench.records.frame import records_frame
    from rlhfbench.runs.drawing import draw_timelines
    from rlhfreports.plans import draw_plan

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(json.dumps(plans, indent=1) + "\n", encoding="utf-8")
        limit = None if gpu is None else find_accelerator(gpu)
        draw_plan(
            frame(plans),
            folder / "plan",
            caption=_caption(plans, gpu),
            limit_bytes=None if limit is None else limit.memory_bytes,
        )
        for case_id, timeline in (timelines or {}).items():
            write_timeline(folder / TIMELINES_NAME, case_id, timeline)
        draw_timelines(records_frame(plans), folder / TIMELINES_NAME)
    except OSError as error:
        raise RunFolderError(f"out '{folder}' cannot be written: {error.strerror}.") from error


def _caption(plans: list[dict[str, Any]], gpu: str | None) -> str:
    from rlhfbench.records.frame import records_frame
    from rlhfreports.columns import shared_axes_text

    # The device is no machine's here: it only says how storages are counted.
    words = [shared_axes_text(records_frame(plans).assign(device=""))]
    stage, num_ranks = (plans[0]["zero"][key] for key in ("stage", "world_size"))
    if stage or num_ranks > 1:
        words.append(f"ZeRO-{stage}, one rank of {num_ranks}")
    if gpu is not None:
        limit = find_accelerator(gpu)
        gib, reserve = limit.memory_bytes / 2**30, limit.reserve_bytes / 2**30
        words.append(f"{limit.name}: {gib:.0f} GiB, {reserve:.1f} of it reserved (an estimate)")
    return " · ".join(word for word in words if word)
