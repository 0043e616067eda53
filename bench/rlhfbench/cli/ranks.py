"""The options of ``rlhfbench run`` for cases of several ranks, and the sweep made with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhfbench.cli.common import make_sweep, number, numbers
from rlhfbench.errors import SweepError

if TYPE_CHECKING:
    from rlhfbench.cases.sweep import Sweep
    from rlhfkernels.config.case import Case

RANKS = "Ranks"

WorldSize = Annotated[
    str | None,
    typer.Option(
        metavar="N,...",
        rich_help_panel=RANKS,
        help="Run each case over N processes; several numbers run it at each.  [default: the launcher's, or no ranks]",
    ),
]
Parallel = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=RANKS,
        help="How ranks share a step: ddp, fsdp or deepspeed.  [default: ddp]",
    ),
]
ZeroStage = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        parser=number("--zero-stage", int),
        rich_help_panel=RANKS,
        help="Stage of DeepSpeed's ZeRO, 0 to 3.  [default: 0]",
    ),
]
GlobalBatch = Annotated[
    bool,
    typer.Option("--global-batch", rich_help_panel=RANKS, help="Batch sizes are over all ranks, not of one rank."),
]


def make_ranked_sweep(
    spec: Mapping[str, Any], file: str | None, setting: str | None, params: Mapping[str, Any]
) -> Sweep:
    """The sweep of ``rlhfbench.cli.common.make_sweep`` over the ranks that options and launcher name.

    Args:
        spec: see ``make_sweep``.
        file: see ``make_sweep``.
        setting: see ``make_sweep``.
        params: the parameters of the verb: ``world_size``, ``parallel``, ``zero_stage``, ``global_batch``.

    Raises:
        SweepError: every problem, one sentence each.
    """
    from rlhfbench.cases.sweep import Sweep
    from rlhfbench.launch import find_launch

    launch = find_launch()
    sizes = numbers("--world-size", params["world_size"])
    wrong = [size for size in sizes or () if size < 1]
    if wrong:
        raise SweepError(f"--world-size has {size}: it must be whole numbers of at least 1." for size in wrong)
    if sizes is None and params["parallel"] is not None and launch is None:
        raise SweepError([f"--parallel is {params['parallel']!r}: it needs --world-size N."])
    if sizes is None and launch is not None:
        sizes = [launch.size]
    if sizes is None and params["zero_stage"] is not None:
        raise SweepError([f"--zero-stage is {params['zero_stage']}: it needs --world-size N."])
    if sizes is None:
        made = [make_sweep(spec, file, setting)]
    else:
        made = [make_sweep(_ranked(spec, size, params), file, setting) for size in dict.fromkeys(sizes)]
    sweep = Sweep.joined(made)
    return _of_one_rank(sweep) if params["global_batch"] else sweep


def _ranked(spec: Mapping[str, Any], size: int, params: Mapping[str, Any]) -> dict[str, Any]:
    """``spec`` with the options of ``size`` ranks; an option that is given by its dotted name wins."""
    own = {"parallel.world_size": size, "parallel.strategy": params["parallel"] or "ddp"}
    if params["zero_stage"] is not None:
        own["parallel.zero_stage"] = params["zero_stage"]
    return {**spec, "options": own | spec.get("options", {})}


def _of_one_rank(sweep: Sweep) -> Sweep:
    """The sweep whose batch sizes are of one rank, where they were over all."""
    from rlhfbench.cases.sweep import Sweep
    from rlhfbench.planning.zero import cases_of_a_rank

    cases: list[Case] = []
    problems: list[str] = []
    for case in sweep.cases:
        try:
            cases += cases_of_a_rank([case], case.options.parallel.world_size)
        except SweepError as error:
            problems += error.problems
    if problems:
        raise SweepError(problems)
    return Sweep(cases=tuple({case.id: case for case in cases}.values()))
