"""The inputs of the page: runs, each with its frame and what stands beside the records in its folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from rlhfreports.columns import CONDITIONS, HOST, RUN, SEGMENT, START
from rlhfreports.compare import HARDWARE

Profile = Mapping[str, pd.DataFrame]  # see ``rlhfreports.profiles``
# Points and phases, see ``rlhfreports.timelines``, and the largest tensors, see ``rlhfreports.page.timeline``.
Timeline = tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run as the page needs it.

    Attributes:
        name: tells it from the other runs of the page.
        frame: the records; see ``rlhfreports.columns``.
        blocks: one row per block of a case; see ``rlhfreports.frames.block_times``.
        ranks: one row per rank of a case over ranks; see ``rlhfreports.ranks.rank_bars``.
        environments: the environments of its segments, its start first. Empty where none is recorded.
        sweep: the resolved sweep as TOML, empty where none is recorded.
        timelines: points, phases and largest tensors of the cases whose timelines the page shows, by ``case_id``.
        predicted_timelines: the same of their plans, where they were planned.
        profiles: the profiles of the cases that were profiled and that the page shows, by ``case_id``.
    """

    name: str
    frame: pd.DataFrame
    blocks: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)
    ranks: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)
    environments: Sequence[Mapping[str, Any]] = ()
    sweep: str = ""
    timelines: Mapping[str, Timeline] = dataclasses.field(default_factory=dict)
    predicted_timelines: Mapping[str, Timeline] = dataclasses.field(default_factory=dict)
    profiles: Mapping[str, Profile] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """The input of a section.

    Attributes:
        runs: the runs, in the order in which they were named.
        frame: their rows in one frame; where there are several, with the name of the run in the column ``run``.
        with_paper: the papers' numbers are laid beside the run.
        plans: plans laid beside a single run, as a frame of records; empty for none.
    """

    runs: tuple[Run, ...]
    frame: pd.DataFrame
    with_paper: bool = False
    plans: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)

    @classmethod
    def of(cls, runs: Sequence[Run], *, with_paper: bool = False, plans: pd.DataFrame | None = None) -> Page:
        """Joins ``runs``, which must be one or more."""
        if len(runs) == 1:
            plans = pd.DataFrame() if plans is None else plans
            return cls(runs=tuple(runs), frame=runs[0].frame, with_paper=with_paper, plans=plans)
        named = []
        for run in runs:
            words: dict[str, list[Any]] = {RUN: [run.name] * len(run.frame), HARDWARE: hardware_of(run)}
            named.append(run.frame.assign(**{name: pd.array(texts, dtype="string") for name, texts in words.items()}))
        frame = pd.concat(named, ignore_index=True)
        if CONDITIONS in frame:  # a run whose conditions did not change has no such column
            frame[CONDITIONS] = frame[CONDITIONS].fillna(START)
        return cls(runs=tuple(runs), frame=frame, with_paper=with_paper)


def hardware_of(run: Run) -> list[str | None]:
    """The models of the GPUs, or of the CPU with its cores, of each row of a run; ``None`` where they are not recorded.

    A resumed run has an environment for each segment, and one on a cluster those of its nodes by host.
    """
    columns = (run.frame[SEGMENT].fillna(0), run.frame[HOST], run.frame["device"].astype(str))
    rows = list(zip(*columns, strict=True))
    known = {row: _model_of(_environment_of(run, *row[:2]), row[2]) for row in set(rows)}
    return [known[row] for row in rows]


def _environment_of(run: Run, segment: int, host: Any) -> Any:
    """The environment of a machine in a segment of a run; empty where it is not recorded."""
    if segment not in range(len(run.environments)):
        return {}
    environment = run.environments[segment]
    nodes = environment.get("nodes")
    return nodes.get(host, environment) if isinstance(nodes, Mapping) else environment


def _model_of(environment: Any, device: str) -> str | None:
    parts = environment if isinstance(environment, Mapping) else {}
    gpus, cpu = parts.get("gpus"), parts.get("cpu")
    if device.startswith("cuda"):
        found = [gpu.get("name") for gpu in gpus if isinstance(gpu, Mapping)] if isinstance(gpus, list) else []
        return ", ".join(sorted({str(name) for name in found if name})) or None
    if not isinstance(cpu, Mapping) or not cpu.get("model"):
        return None
    return f"{cpu['model']}, {cpu.get('num_usable_cores')} cores"
