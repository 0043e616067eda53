from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PolyCollection

from rlhfkernels.observer import PARTS
from rlhfreports.timelines import draw_timeline, timeline_figure

GIB = 2**30
WORDS = {"title": "Hydra-PPO", "caption": "tiny"}


def points(totals_gib: list[float], first_event: int = 1) -> pd.DataFrame:
    """Two parts, a third and two thirds of each total; one event a point."""
    events = range(first_event, first_event + len(totals_gib))
    shares = {"base": 1 / 3, "activations": 2 / 3}
    sizes = {f"{part}_part_bytes": [shares.get(part, 0) * total * GIB for total in totals_gib] for part in PARTS}
    return pd.DataFrame({"event": list(events), **sizes})


def phases(*ends: tuple[str, int, int]) -> pd.DataFrame:
    return pd.DataFrame(list(ends), columns=["phase", "first_event", "last_event"])


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_areas_are_stacked_to_the_total_and_the_peak_is_marked() -> None:
    frame = points([3.0, 6.0, 9.0, 3.0])
    (axes,) = timeline_figure(frame, phases(("score", 0, 2), ("update_actor", 2, 4)), **WORDS).axes
    areas = [area for area in axes.collections if isinstance(area, PolyCollection)]
    assert len(areas) == len(PARTS) - 2  # those of ranks are left out
    assert max(area.get_paths()[0].vertices[:, 1].max() for area in areas) == pytest.approx(9.0)
    assert areas[0].get_paths()[0].vertices[:, 1].max() == pytest.approx(3.0)  # base
    (dot,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (pytest.approx(0.75), pytest.approx(9.0))
    assert texts(axes) == ["score", "update actor", "peak 9 GiB"]
    assert axes.get_ylabel() == "GiB"


def test_a_short_phase_is_widened_with_its_boundaries_labelled() -> None:
    frame = points([1.0] * 1000)
    (axes,) = timeline_figure(frame, phases(("generate", 0, 990), ("optimize", 990, 1000)), **WORDS).axes
    (boundary,) = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    right = axes.get_xlim()[1]
    assert (right - boundary) / right > 0.1
    assert axes.get_xticks().tolist() == [0, pytest.approx(boundary), pytest.approx(right)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "990", "1,000"]


def test_events_before_the_first_phase_are_left_out() -> None:
    frame = points([100.0, 100.0, 1.0, 2.0])
    (axes,) = timeline_figure(frame, phases(("score", 3, 4)), **WORDS).axes
    assert "peak 2 GiB" in texts(axes)


def test_many_phases_and_none_can_be_drawn() -> None:
    many = phases(*((f"update_{i % 2}", i, i + 1) for i in range(100)))
    (axes,) = timeline_figure(points([1.0] * 100), many, **WORDS).axes
    assert len(axes.get_xticks()) < 20
    assert np.isfinite(axes.get_xlim()).all()
    (axes,) = timeline_figure(points([]), phases(), **WORDS).axes
    assert texts(axes) == []


def test_the_files_depend_on_the_frames_alone(tmp_path: Path) -> None:
    tables = points([3.0, 6.0, 9.0]), phases(("score", 0, 3))
    first = draw_timeline(*tables, tmp_path / "a", **WORDS)
    second = draw_timeline(*tables, tmp_path / "b", **WORDS)
    assert [path.suffix for path in first] == [".png", ".svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
