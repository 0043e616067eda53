"""The options for cases of several ranks, and the sweep made with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhfbench.cli.cases import make_sweep
from rlhfbench.cli.common import check_options, given, numbers, words
from rlhfbench.errors import SweepError
from rlhfkernels.config.rules import shown

if TYPE_CHECKING:
    from rlhfbench.cases.sweep import Sweep

RANKS = "Ranks"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankOptions:
    """The options for cases of several ranks."""

    world_size: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            rich_help_panel=RANKS,
            help="Ranks (processes) per case; a list makes one case per value.  [default: one process; run: the"
            " launcher's]",
        ),
    ] = None
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            rich_help_panel=RANKS,
            help="Strategy of the ranks: ddp, fsdp or deepspeed; a list makes one case per value.  [default: ddp]",
        ),
    ] = None
    zero_stage: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            rich_help_panel=RANKS,
            help="DeepSpeed ZeRO stages, 0 to 3; implies --parallel deepspeed.  [default: 0]",
        ),
    ] = None
    global_batch: Annotated[
        bool,
        typer.Option(
            "--global-batch", rich_help_panel=RANKS, help="Batch sizes are totals over all ranks, not per rank."
        ),
    ] = False

    @property
    def define_cases(self) -> bool:
        """True if one of them was given that makes other cases."""
        return self.global_batch or any(
            value is not None for value in (self.world_size, self.parallel, self.zero_stage)
        )


def make_ranked_sweep(
    spec: Mapping[str, Any],
    file: str | None,
    setting: str | None,
    ranks: RankOptions,
    *,
    launched: int | None = None,
) -> Sweep:
    """The sweep of ``rlhfbench.cli.cases.make_sweep`` over the ranks that options and launcher name.

    Args:
        spec: see ``make_sweep``.
        file: see ``make_sweep``.
        setting: see ``make_sweep``.
        ranks: the options of ranks.
        launched: processes that a launcher started; ``None`` without one.

    Raises:
        SweepError: every problem, one sentence each.
    """
    sizes, stages = numbers("--world-size", ranks.world_size), numbers("--zero-stage", ranks.zero_stage)
    wrong = [size for size in sizes or () if size < 1]
    if wrong:
        raise SweepError(f"--world-size has {size}: every value must be an integer of at least 1." for size in wrong)
    strategies = words(ranks.parallel) or (None if stages is None else ["deepspeed"])  # ZeRO is DeepSpeed's
    own = _options(world_size=sizes, strategy=strategies, zero_stage=stages)
    defaults: dict[str, Any] = {}
    if sizes or launched is not None:
        defaults = _options(world_size=launched, strategy="ddp")
    options = spec.get("options", {})
    named = {
        "--world-size": ("parallel.world_size", _one(sizes)),
        "--parallel": ("parallel.strategy", _one(words(ranks.parallel))),
        "--zero-stage": ("parallel.zero_stage", _one(stages)),
    }
    check_options(named, options)
    # A strategy that is given by its dotted name wins over that of --zero-stage.
    spec = {**spec, "options": own | options} if own else spec
    sweep = make_sweep(spec, file, setting, defaults={"options": defaults} if defaults else None)
    if strategies and not defaults and all(case.options.parallel.world_size == 1 for case in sweep.cases):
        flag = f"--zero-stage is {ranks.zero_stage}" if stages else f"--parallel is {shown(ranks.parallel)}"
        raise SweepError([f"{flag}: it needs --world-size N."])
    if ranks.global_batch and not defaults and all(case.options.parallel.world_size == 1 for case in sweep.cases):
        raise SweepError(["--global-batch needs --world-size N."])
    return _of_one_rank(sweep) if ranks.global_batch else sweep


def _one(values: Sequence[Any] | None) -> Any:
    """The only one of ``values``; all of them where there are several."""
    return values[0] if values is not None and len(values) == 1 else values


def _options(**values: Any) -> dict[str, Any]:
    """The options of ranks that were given, by dotted name."""
    return {f"parallel.{name}": value for name, value in given(**values).items()}


def _of_one_rank(sweep: Sweep) -> Sweep:
    """The sweep whose batch sizes are of one rank, where they were over all."""
    from rlhfbench.cases.sweep import Sweep
    from rlhfbench.planning.zero import cases_of_a_rank

    return Sweep(cases=tuple({case.id: case for case in cases_of_a_rank(sweep.cases)}.values()))
