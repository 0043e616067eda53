from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pandas as pd
import pytest

from rlhfreports.page.data import Run
from rlhfreports.page.timeline import timeline_chart, timeline_frames

Runs = Callable[..., Run]
GIB = 2**30


def test_moments_have_their_phase_and_every_part(make_run: Runs) -> None:
    moments, spans, _ = timeline_frames(make_run({}))
    assert moments["n"].tolist() == [0, 1, 2, 3]
    assert moments["gib"].tolist() == [1.0, 2.0, 3.0, 1.0]
    assert moments["activations"].tolist() == [0.0, 1.0, 2.0, 0.0]
    assert moments["phase"].tolist() == ["score", "score", "update actor", "update actor"]
    assert moments["x"].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert spans[["left", "right"]].to_numpy().tolist() == [[0, pytest.approx(2 / 3)], [pytest.approx(2 / 3), 1]]


def test_a_tensor_is_named_with_its_phase_and_the_moments_that_it_lives_at(make_run: Runs) -> None:
    _, _, tensors = timeline_frames(make_run({}))
    assert tensors["tensor"].tolist() == ["16 × 4 float32", "8 × 4 float32", "2 float32"]
    assert tensors["op"].tolist() == ["made before the step", "aten.mm", "aten.add.Tensor"]
    assert tensors["made"].tolist() == ["before the phases", "score", "update actor"]
    assert tensors[["first", "last", "end"]].to_numpy().tolist() == [[0, 3, 3], [1, 2, 3], [3, 3, 3]]
    assert tensors["events"].tolist() == ["1–4", "2–3", "4–4"]
    assert tensors["place"].tolist() == [0, 2, 2]


def test_moments_of_a_second_case_have_numbers_of_their_own(make_run: Runs) -> None:
    run = make_run({}, {"method": "lora"})
    timeline = run.timelines["case0"]
    both = dataclasses.replace(run, timelines={"case0": timeline, "case1": timeline})
    moments, _, tensors = timeline_frames(both)
    assert moments["n"].tolist() == list(range(8))
    assert tensors["id"].tolist() == list(range(6))
    assert tensors.loc[tensors["case"].str.startswith("LoRA"), "first"].tolist() == [4, 5, 7]


def test_a_tensor_under_a_pixel_of_the_chart_is_left_out(make_run: Runs) -> None:
    run = make_run({})
    points, phases, tensors = run.timelines["case0"]
    smaller = tensors.assign(bytes=[GIB, 3 * GIB // 400, 3 * GIB // 300])
    _, _, found = timeline_frames(dataclasses.replace(run, timelines={"case0": (points, phases, smaller)}))
    assert found["tensor"].tolist() == ["16 × 4 float32", "2 float32"]


def test_a_timeline_without_tensors_is_drawn_without_them(make_run: Runs) -> None:
    run = make_run({})
    points, phases, tensors = run.timelines["case0"]
    chart = timeline_chart(dataclasses.replace(run, timelines={"case0": (points, phases, tensors[:0])}), "t", "")
    assert chart is not None
    assert set(chart.data) == {"t-moments", "t-phases"}
    named = timeline_chart(run, "t", "")
    assert named is not None
    assert len(named.spec["layer"]) == len(chart.spec["layer"]) + 1
    assert "names the tensor" in named.caption
    assert "names the tensor" not in chart.caption


def test_a_timeline_without_phases_is_drawn_without_them(make_run: Runs) -> None:
    run = make_run({})
    points, phases, tensors = run.timelines["case0"]
    run = dataclasses.replace(run, timelines={"case0": (points, phases[:0], tensors)})
    moments, spans, named = timeline_frames(run)
    assert moments[["gib", "phase"]].to_numpy().tolist() == [[1.0, ""], [2.0, ""], [3.0, ""], [1.0, ""]]
    assert spans.empty
    assert set(named["made"]) == {"before the phases"}
    assert timeline_chart(run, "t", "") is not None


def test_no_timeline_makes_no_chart(make_run: Runs) -> None:
    assert timeline_chart(make_run({}, bare=True), "t", "") is None
    assert timeline_chart(dataclasses.replace(make_run({}), frame=pd.DataFrame(make_run().frame)), "t", "") is None
