"""The inputs of the page: runs, each with its frame and what stands beside the records in its folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from rlhfreports.columns import RUN

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
        environments: the environments of its segments, its start first. Empty where none is recorded.
        sweep: the resolved sweep as TOML, empty where none is recorded.
        timelines: points, phases and largest tensors of the cases whose timelines the page shows, by ``case_id``.
        profiles: the profiles of the cases that were profiled and that the page shows, by ``case_id``.
    """

    name: str
    frame: pd.DataFrame
    blocks: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)
    environments: Sequence[Mapping[str, Any]] = ()
    sweep: str = ""
    timelines: Mapping[str, Timeline] = dataclasses.field(default_factory=dict)
    profiles: Mapping[str, Profile] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """The input of a section.

    Attributes:
        runs: the runs, in the order in which they were named.
        frame: their rows in one frame; where there are several, with the name of the run in the column ``run``.
        with_paper: the papers' numbers are laid beside the run.
    """

    runs: tuple[Run, ...]
    frame: pd.DataFrame
    with_paper: bool = False

    @classmethod
    def of(cls, runs: Sequence[Run], *, with_paper: bool = False) -> Page:
        """Joins ``runs``, which must be one or more."""
        if len(runs) == 1:
            return cls(runs=tuple(runs), frame=runs[0].frame, with_paper=with_paper)
        named = [run.frame.assign(**{RUN: pd.array([run.name] * len(run.frame), dtype="string")}) for run in runs]
        return cls(runs=tuple(runs), frame=pd.concat(named, ignore_index=True), with_paper=with_paper)
