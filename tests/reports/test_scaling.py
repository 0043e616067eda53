from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rlhfreports.scaling import draw_scaling, has_scaling, scaling_figure, scaling_frame, scaling_lines, scaling_table

GIB = 2**30
Make = Callable[..., pd.DataFrame]


def ranked(size: int, batch: int, seconds: float, **changes: Any) -> dict[str, Any]:
    strategy, stage = changes.pop("parallel", "ddp"), changes.pop("zero_stage", None)
    others = changes.pop("others", "")
    options = ", ".join(filter(None, [f"parallel.strategy={strategy}", f"parallel.world_size={size}", others]))
    return {
        "batch_size": batch,
        "world_size": size,
        "global_batch_size": batch * size,
        "parallel": strategy,
        "zero_stage": stage,
        "options": options,
        "total_s_per_sample": seconds,
        "waiting_share": 0.25,
        "imbalance": 0.1,
        "worst_rank": size - 1,
        "communication_bytes": 2**20,
        **changes,
    }


def test_lines_of_weak_and_of_strong_scaling(make_frame: Make) -> None:
    frame = make_frame(ranked(1, 4, 1.0), ranked(2, 4, 0.5), ranked(2, 2, 0.625), ranked(4, 1, 0.5))
    lines = [(line.kind, list(line.rows["world_size"]), list(line.rows["batch_size"])) for line in scaling_lines(frame)]
    # The point of two ranks with batch 2 has no partner of the same batch; over all ranks it has three.
    assert lines == [("weak", [1, 2], [4, 4]), ("strong", [1, 2, 4], [4, 2, 1])]
    points = scaling_frame(frame)
    assert points["speed_up"].tolist() == pytest.approx([1.0, 2.0, 1.0, 1.6, 2.0])
    assert points["efficiency"].tolist() == pytest.approx([1.0, 1.0, 1.0, 0.8, 0.5])


@pytest.mark.parametrize(
    "other",
    [
        {"parallel": "fsdp"},
        {"parallel": "deepspeed", "zero_stage": 1},
        {"others": "parallel.gather=rollout"},
        {"prompt_len": 16},
        {"method": "lora"},
        {"dtype": "bfloat16"},
        {"outcome": "oom", "total_s_per_sample": None},
    ],
)
def test_cases_that_differ_in_more_than_their_ranks_make_no_line(make_frame: Make, other: dict[str, Any]) -> None:
    assert has_scaling(make_frame(ranked(1, 4, 1.0), ranked(2, 4, 0.5)))
    assert not has_scaling(make_frame(ranked(1, 4, 1.0), {**ranked(2, 4, 0.5, **other)}))


def test_a_run_without_ranks_has_no_scaling(make_frame: Make) -> None:
    frame = make_frame({}, {"batch_size": 2})
    assert not has_scaling(frame)
    assert not has_scaling(frame.drop(columns="world_size"))
    assert scaling_frame(frame).empty


def test_the_table(make_frame: Make) -> None:
    stage = {"parallel": "deepspeed", "zero_stage": 2}
    frame = make_frame(ranked(2, 4, 1.0, **stage), ranked(4, 4, 0.625, **stage, waiting_share=None, imbalance=None))
    table = scaling_table(frame)
    assert table.rows == (
        ("Hydra-PPO", "ZeRO-2", "weak", "64", "4", "2", "1.000", "1.00x", "100%", "1.500", "25%", "10%", "1.00"),
        ("Hydra-PPO", "ZeRO-2", "weak", "64", "4", "4", "0.625", "1.60x", "80%", "1.500", "–", "–", "1.00"),
    )
    assert "| ZeRO-2" in table.markdown()
    assert table.csv().splitlines()[0].startswith("method,global_batch_size,worst_rank,")


def test_the_figure_has_a_line_for_each_method_and_strategy(make_frame: Make, tmp_path: Path) -> None:
    frame = make_frame(
        *(ranked(size, 4, 1.0 / size, method=method, **how)
          for method in ("hydra", "lora")
          for how in ({"parallel": "ddp"}, {"parallel": "fsdp"})
          for size in (1, 2)),
    )  # fmt: skip
    seconds, memory, waiting = scaling_figure(frame).axes
    assert len(seconds.lines) == len(memory.lines) == len(waiting.lines) == 4
    assert len({(line.get_color(), line.get_linestyle()) for line in seconds.lines}) == 4
    assert list(seconds.lines[0].get_ydata()) == [1.0, 0.5]
    assert list(waiting.lines[0].get_ydata()) == [25.0, 25.0]
    png, svg = draw_scaling(frame, tmp_path / "scaling")
    assert png.stat().st_size > 10_000
    assert svg.read_text().startswith("<?xml")
