"""The options of ``rlhfbench run`` beside those that define cases."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhfbench.cli.common import given, name_text, number, path_text, words
from rlhfbench.errors import SweepError
from rlhfbench.records.schema import OUTCOMES
from rlhfbench.runs.options import MAX_BATCH, RunOptions
from rlhfkernels.naming import unknown

if TYPE_CHECKING:
    from rlhfbench.cluster.place import Cluster

MEASUREMENT, OUTPUT, CLUSTER = "Measurement", "Output", "Cluster"
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(RunOptions)}
_RETRIED = OUTCOMES[1:]  # all but ok


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasurementOptions:
    """The options of the measurement."""

    time_budget_s: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            parser=number("--time-budget-s", float),
            rich_help_panel=MEASUREMENT,
            help="Seconds for timing the steps of a case, over all its blocks."
            f"  [default: {_DEFAULTS['time_budget_s']:g}]",
        ),
    ] = None
    blocks: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=number("--blocks", int),
            rich_help_panel=MEASUREMENT,
            help="Blocks per case, each timed in a fresh process. From the second block on, cases run in random order."
            " One block gives no interval.  [default: 4, or 1 if building and preparing take over 10 s]",
        ),
    ] = None
    case_timeout_s: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            parser=number("--case-timeout-s", float),
            rich_help_panel=MEASUREMENT,
            help=f"Seconds after which a case is killed.  [default: {_DEFAULTS['case_timeout_s']:g}]",
        ),
    ] = None
    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=MEASUREMENT,
            help="Memory that a case, or each of its ranks, may allocate: 4GiB; none for no limit.  [default: none]",
        ),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=number("--threads", int),
            rich_help_panel=MEASUREMENT,
            help="Threads of torch in a case."
            "  [default: torch's choice; with several ranks, each rank's share of the cores]",
        ),
    ] = None
    profile: Annotated[
        bool | None,
        typer.Option(
            "--profile/--no-profile",
            rich_help_panel=MEASUREMENT,
            help="Trace each phase, into the folder DIR/traces.  [default: no]",
        ),
    ] = None
    with_plan: Annotated[
        bool | None,
        typer.Option(
            "--with-plan/--no-with-plan",
            rich_help_panel=MEASUREMENT,
            help="Also predict the memory of each case.  [default: no]",
        ),
    ] = None
    max_batch: Annotated[
        bool,
        typer.Option(
            "--max-batch",
            rich_help_panel=MEASUREMENT,
            help="Find the largest batch that runs, for every method and length.",
        ),
    ] = False
    max_batch_limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=number("--max-batch-limit", int),
            rich_help_panel=MEASUREMENT,
            help=f"Largest batch that --max-batch tries.  [default: {MAX_BATCH}]",
        ),
    ] = None

    def options(self, recorded: Mapping[str, Any]) -> RunOptions:
        """Returns the options of the run; those that were given win over ``recorded`` settings.

        Raises:
            SweepError: a value breaks its rule.
        """
        from rlhfbench.cases.sizes import parse_size

        limit: dict[str, int | None] = {}
        if self.memory_limit is not None:
            is_size = self.memory_limit != "none"
            limit["memory_limit_bytes"] = parse_size("--memory-limit", self.memory_limit) if is_size else None
        return RunOptions.recorded(
            {
                **recorded,
                **limit,
                **given(
                    time_budget_s=self.time_budget_s,
                    blocks=self.blocks,
                    case_timeout_s=self.case_timeout_s,
                    num_threads=self.threads,
                    profile=self.profile,
                    with_plan=self.with_plan,
                ),
            }
        )

    def batch_limit(self, recorded: Mapping[str, Any]) -> int | None:
        """Returns the largest batch that a search tries; ``None`` where the largest batches are not searched for.

        Raises:
            SweepError: a limit was given and no search, or a run that is resumed is none.
        """
        before = recorded.get("max_batch_limit")
        if self.max_batch and recorded and before is None:
            raise SweepError(["--max-batch: the run to resume is no search for the largest batch: name a new folder."])
        if not self.max_batch and before is None:
            if self.max_batch_limit is not None:
                raise SweepError(["--max-batch-limit needs --max-batch."])
            return None
        return (before or MAX_BATCH) if self.max_batch_limit is None else self.max_batch_limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """The cluster that runs the cases."""

    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            parser=name_text("--ray"),
            rich_help_panel=CLUSTER,
            help="Run the cases on a Ray cluster: HOST:PORT of its head, local to start one on this machine, or none to"
            " use no cluster.",
        ),
    ] = None
    ray_group: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            parser=name_text("--ray-group"),
            rich_help_panel=CLUSTER,
            help="Cases that run on one machine, so that their times are comparable: sweep (all of them), model, size "
            "(one model, lengths and batch) or case (none).  [default: sweep]",
        ),
    ] = None

    def place(self, recorded: Mapping[str, Any], *, searches: bool) -> Cluster | None:
        """Returns the cluster; ``None`` for this machine.

        Args:
            recorded: settings of the run to resume.
            searches: the largest batches are searched for.

        Raises:
            SweepError: a group without a cluster, or a search on one.
        """
        address, group = self.ray or recorded.get("ray"), self.ray_group
        if address is None or address == "none":
            if group is not None:
                raise SweepError([f"--ray-group is {group!r}: it needs --ray ADDRESS."])
            return None
        if searches:
            problem = "--max-batch tries one batch after the other, on this machine alone"
            raise SweepError([f"--ray is {address!r}: {problem}."])
        from rlhfbench.cluster.place import Cluster

        return Cluster(address, group or recorded.get("ray_group") or "sweep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """The folder of the run."""

    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            parser=path_text("--out"),
            rich_help_panel=OUTPUT,
            help="Folder of the run; a new one by default.",
        ),
    ] = None
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            parser=path_text("--resume"),
            rich_help_panel=OUTPUT,
            help="Continue the run in DIR, with its cases and settings. Options of the measurement and of the cluster"
            " override the settings.",
        ),
    ] = None
    retry: Annotated[
        str | None,
        typer.Option(
            metavar="OUTCOMES",
            rich_help_panel=OUTPUT,
            help=f"With --resume, run cases of these outcomes again: {', '.join(_RETRIED)}.",
        ),
    ] = None

    def folder(self) -> Path:
        """Returns the folder.

        Raises:
            SweepError: the options contradict each other.
        """
        if self.resume is not None and self.out is not None:
            raise SweepError(
                [f"--out is {self.out!r}: it must be left out, since --resume names the folder of the run."]
            )
        if self.retry is not None and self.resume is None:
            raise SweepError([f"--retry is {self.retry!r}: it needs --resume DIR."])
        return Path(self.resume or self.out or f"rlhfbench-run-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}")

    def retried(self) -> list[str]:
        """Returns the outcomes whose cases are run again.

        Raises:
            SweepError: no such outcome exists.
        """
        names = words(self.retry) or []
        wrong = [unknown("--retry", name, _RETRIED) for name in names if name not in _RETRIED]
        if wrong:
            raise SweepError(wrong)
        return names
