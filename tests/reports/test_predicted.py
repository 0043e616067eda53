from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from rlhfreports.predicted import (
    comparisons,
    has_predictions,
    predicted_markdown,
    worst,
)
from rlhfreports.predicted_plot import draw_predicted, predicted_figure

GIB = 2**30


def planned(model: int, activation: int) -> dict[str, int]:
    return {
        "predicted_model_bytes": model,
        "predicted_activation_bytes": activation,
        "predicted_rollout_bytes": 4096,
        "predicted_total_bytes": model + activation + 4096,
    }


@pytest.fixture
def frame(make_frame: Callable[..., pd.DataFrame]) -> pd.DataFrame:
    """Measured: 1 GiB of model, half a GiB of activations."""
    return make_frame(
        {"method": "lora", **planned(GIB, GIB // 2)},
        {"method": "hydra", **planned(GIB, 3 * GIB // 8)},
        {"method": "hydra", "batch_size": 4, "outcome": "oom", **planned(2 * GIB, GIB)},
        {"method": "full", "plan_error": "no fake of that."},
        {"method": "full", "batch_size": 4},
    )


def test_the_worst_comparison_has_the_largest_error_in_percent(frame: pd.DataFrame) -> None:
    found = comparisons(frame)
    assert [item.percent for item in found if item.kind == "model"] == [0.0, 0.0, None]
    farthest = worst(found)
    assert farthest is not None
    assert (farthest.case, farthest.kind, farthest.percent) == (
        "Hydra-PPO, 64 tokens (32+32), batch 1",
        "activation",
        -25.0,
    )


def test_the_table_has_every_prediction_and_a_note_per_failed_plan(frame: pd.DataFrame) -> None:
    lines = predicted_markdown(frame).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]
    assert rows[0][1:7] == ["1", "1", "+0.000 %", "0.5", "0.5", "+0.000 %"]
    assert rows[1][4:7] == ["0.375", "0.5", "-25.000 %"]
    assert rows[2][1:4] == ["2", "OOM", "–"]
    assert len(rows) == 3
    assert "Farthest off: Hydra-PPO, 64 tokens (32+32), batch 1, activation memory, -25.000 %." in lines
    assert lines[-1] == "- PPO, 64 tokens (32+32), batch 1: no prediction: no fake of that."


def test_each_sum_has_a_panel_with_markers_and_the_diagonal(frame: pd.DataFrame) -> None:
    figure = predicted_figure(frame)
    assert [axes.get_title() for axes in figure.axes] == ["model memory", "activation memory", "total memory"]
    axes = figure.axes[1]
    lines = {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in axes.lines}
    assert set(lines) == {"_diagonal", "LoRA-PPO", "Hydra-PPO"}
    assert tuple(lines["_diagonal"][0]) == tuple(lines["_diagonal"][1]) == axes.get_xlim() == axes.get_ylim()
    assert lines["Hydra-PPO"] == ([0.375], [0.5])
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert any("Farthest off: Hydra-PPO" in text.get_text() for text in figure.texts)


def test_predictions_without_a_measurement(make_frame: Callable[..., pd.DataFrame]) -> None:
    frame = make_frame({"outcome": "oom", **planned(GIB, GIB)})
    assert has_predictions(frame)
    assert "No case was measured" in predicted_markdown(frame)
    assert len(predicted_figure(frame).axes) == 3


def test_a_run_whose_plans_all_failed_has_no_prediction(make_frame: Callable[..., pd.DataFrame]) -> None:
    found = predicted_markdown(make_frame({"plan_error": "why."}))
    assert "No case was predicted: there is nothing to compare with." in found
    assert "No case was measured" not in found


def test_a_run_without_plans_has_no_predictions(make_frame: Callable[..., pd.DataFrame]) -> None:
    assert not has_predictions(make_frame({}))
    assert has_predictions(make_frame({"plan_error": "why."}))


def test_the_files_depend_on_the_frame_alone(frame: pd.DataFrame, tmp_path: Path) -> None:
    first, second = (draw_predicted(frame, tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
