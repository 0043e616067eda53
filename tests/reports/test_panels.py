from __future__ import annotations

import pytest

from rlhfreports.columns import is_measured
from rlhfreports.panels import panels_of


def keys(rows) -> set[tuple[str, int, int]]:
    return set(zip(rows["method"], rows["seq_len"], rows["batch_size"], strict=True))


def test_panels_are_the_batch_sizes_where_all_fit(make_frame):
    frame = make_frame(*({"batch_size": b, "prompt_len": n} for b in (4, 1, 16) for n in (8, 16)))
    panels = panels_of(frame)
    assert [panel.title for panel in panels] == ["batch 1", "batch 4", "batch 16"]
    assert not any(panel.shows_batch for panel in panels)


def test_the_last_panel_has_the_largest_batch_that_fits(make_frame):
    frame = make_frame(
        {"method": "full", "batch_size": 1},
        {"method": "full", "batch_size": 4, "outcome": "oom"},
        {"method": "hydra", "batch_size": 1},
        {"method": "hydra", "batch_size": 4},
        {"method": "lora", "batch_size": 1, "outcome": "oom"},
        {"method": "lora", "batch_size": 4, "outcome": "skipped"},
    )
    last = panels_of(frame)[-1]
    assert last.title == "largest batch that fits"
    assert last.shows_batch
    assert keys(last.points) == {("full", 64, 1), ("hydra", 64, 4)}
    # What fits at no batch size is told once.
    assert keys(last.failures) == {("lora", 64, 1)}


def test_different_batch_sizes_without_a_failure_get_a_last_panel(make_frame):
    last = panels_of(make_frame({"method": "full", "batch_size": 1}, {"method": "hydra", "batch_size": 2}))[-1]
    assert keys(last.points) == {("full", 64, 1), ("hydra", 64, 2)}
    assert keys(last.failures) == set()


def test_the_settings_of_a_method_share_a_panel(make_frame):
    paper = {"setting": "paper", "dtype": "bfloat16"}
    one, two, largest = panels_of(
        make_frame({}, {"batch_size": 2}, paper, {"batch_size": 2, "outcome": "oom", **paper})
    )
    assert [panel.title for panel in (one, two, largest)] == ["batch 1", "batch 2", "largest batch that fits"]
    assert one.points["setting"].tolist() == ["modern", "paper"]
    found = set(zip(largest.points["setting"], largest.points["batch_size"], strict=True))
    assert found == {("modern", 2), ("paper", 1)}


def test_every_row_is_a_point_or_a_failure_of_its_batch_panel(make_frame):
    outcomes = ("ok", "oom", "timeout", "crashed", "invalid", "skipped")
    frame = make_frame(
        *({"outcome": o, "batch_size": b, "method": m} for o, m in zip(outcomes, "abcdef", strict=True) for b in (1, 2))
    )
    panels = [panel for panel in panels_of(frame) if not panel.shows_batch]
    found = [key for panel in panels for rows in (panel.points, panel.failures) for key in keys(rows)]
    assert sorted(found) == sorted(keys(frame))


def test_other_axes_make_panels_of_their_own(make_frame):
    frame = make_frame({"model": "tiny"}, {"model": "gpt2"}, {"model": "gpt2", "options": "attention=eager"})
    panels = panels_of(frame)
    assert [panel.title for panel in panels] == [
        "tiny · no options · batch 1",
        "gpt2 · no options · batch 1",
        "gpt2 · attention=eager · batch 1",
    ]
    assert [len(panel.points) for panel in panels] == [1, 1, 1]


@pytest.mark.parametrize("seconds", [None, float("nan"), 0.0, -1.0])
def test_a_time_that_a_logarithm_cannot_show_is_no_point(make_frame, seconds):
    frame = make_frame({"total_s_per_sample": seconds}, {"method": "full"})
    assert is_measured(frame).tolist() == [False, True]
    assert keys(panels_of(frame)[0].failures) == {("hydra", 64, 1)}


def test_no_records_no_panels(make_frame):
    assert panels_of(make_frame()) == []


def test_splits_of_a_length_have_panels_of_their_own(make_frame):
    """A line has one point at a length."""
    splits = ({"prompt_len": 16, "completion_len": 48}, {"prompt_len": 48, "completion_len": 16})
    panels = panels_of(make_frame(*splits))
    assert [panel.title for panel in panels] == ["prompt 16 · batch 1", "prompt 48 · batch 1"]
    assert [len(panel.points) for panel in panels] == [1, 1]
