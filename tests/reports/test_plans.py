from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from rlhfkernels.observer import PARTS
from rlhfreports.plans import draw_plan, plan_figure, plan_table

GIB = 2**30
# The parts that one process has.
ALONE = [part for part in PARTS if part not in ("gathered", "buckets")]


def frame() -> pd.DataFrame:
    row = {f"{part}_part_bytes": (i + 1) * GIB for i, part in enumerate(ALONE)}
    row |= {f"{part}_part_bytes": 0 for part in PARTS if part not in ALONE}
    total = sum(row.values())
    shared = {"seq_len": 800, "total_bytes": total, "model_bytes": 1, "activation_bytes": 1, "peak_phase": "score"}
    shared |= {"model": "tiny", "setting": "modern", "lora_rank": 16, "options": "", "strategy": "", "world_size": 1}
    known = {"fits": True, "max_batch_size": 7.0, "floor_s_per_sample": 0.25}
    unknown = {"fits": None, "max_batch_size": None, "floor_s_per_sample": None}
    return pd.DataFrame(
        [
            {"title": "A-PPO", "batch_size": 1, **row, **shared, **known},
            {"title": "B-PPO", "batch_size": 4, **row, **shared, **unknown},
        ]
    )


def test_the_table_has_every_part_and_result() -> None:
    console = Console(width=250, record=True)
    console.print(plan_table(frame(), caption="tiny"))
    first, second = (line.split() for line in console.export_text().splitlines() if "-PPO" in line)
    assert first == ["A-PPO", "800", "1", "45.00", "yes", "7", "0.25", "score", *(f"{i + 1:.2f}" for i in range(9))]
    console.print(plan_table(frame(), caption="tiny", max_batch_limit=7))
    assert [line.split()[5] for line in console.export_text().splitlines() if "A-PPO" in line] == ["7+"]
    assert second[3:8] == ["45.00", "–", "–", "–", "score"]


def test_bars_are_stacked_to_the_total_with_the_device_as_a_line() -> None:
    (axes,) = plan_figure(frame(), caption="tiny", limit_bytes=40 * GIB).axes
    assert len(axes.patches) == 2 * len(ALONE)
    assert max(bar.get_x() + bar.get_width() for bar in axes.patches) == pytest.approx(45)
    assert axes.lines[0].get_xdata()[0] == 40


@pytest.mark.parametrize(("gib", "words"), [(1.5, "1.5 GiB"), (2.25, "2.25 GiB"), (8, "8 GiB"), (131.3, "131 GiB")])
def test_the_memory_of_a_small_device_is_not_rounded_to_whole_gib(gib: float, words: str) -> None:
    (axes,) = plan_figure(frame(), caption="tiny", limit_bytes=int(gib * GIB)).axes
    assert words in [text.get_text().strip() for text in axes.texts]


def test_the_parts_of_ranks_are_shown_where_a_case_has_them() -> None:
    ranks = frame().assign(gathered_part_bytes=[0, GIB])
    names = [" ".join(column.name.split()) for column in plan_table(ranks, caption="tiny").columns]
    assert [name for name in names if "gathered" in name or "bucket" in name] == ["gathered GiB"]


def test_several_settings_are_a_column() -> None:
    both = frame().assign(setting=["paper", "modern"])
    console = Console(width=250, record=True)
    console.print(plan_table(both, caption="tiny"))
    rows = [line.split()[:4] for line in console.export_text().splitlines() if "-PPO" in line]
    assert rows == [["A-PPO", "paper", "800", "1"], ["B-PPO", "modern", "800", "4"]]
    (axes,) = plan_figure(both, caption="tiny", limit_bytes=None).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["A-PPO, paper, 800 tokens, batch 1", "B-PPO, modern, 800 tokens, batch 4"]


def test_several_strategies_and_worlds_are_columns() -> None:
    both = frame().assign(strategy=["", "ZeRO-1"], world_size=[1, 8])
    console = Console(width=250, record=True)
    console.print(plan_table(both, caption="tiny"))
    text = console.export_text()
    assert [line.split()[:4] for line in text.splitlines() if "B-PPO" in line] == [["B-PPO", "ZeRO-1", "8", "800"]]
    (axes,) = plan_figure(both, caption="tiny", limit_bytes=None).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["A-PPO, 800 tokens, batch 1", "B-PPO, ZeRO-1, 8 ranks, 800 tokens, batch 4"]


def test_a_picture_has_the_first_100_of_many_cases() -> None:
    many = pd.concat([frame()] * 51, ignore_index=True)
    figure = plan_figure(many.assign(setting=["paper"] * 100 + ["modern"] * 2), caption="tiny", limit_bytes=None)
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert (len(labels), labels[0]) == (100, "A-PPO, paper, 800 tokens, batch 1")
    assert figure.get_suptitle().endswith("\ntiny · the first 100 of 102 cases: plan.json has all")


def test_several_models_lora_ranks_and_options_are_columns() -> None:
    both = frame().assign(model=["tiny", "gpt2"], lora_rank=[1, 8], options=["", "engine.gradient_checkpointing=True"])
    console = Console(width=250, record=True)
    console.print(plan_table(both, caption=""))
    rows = [line.split()[:6] for line in console.export_text().splitlines() if "-PPO" in line]
    assert rows[0][:5] == ["A-PPO", "tiny", "1", "800", "1"]
    assert rows[1] == ["B-PPO", "gpt2", "8", "engine.gradient_checkpointing=True", "800", "4"]
    (axes,) = plan_figure(both, caption="", limit_bytes=None).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "A-PPO, tiny, LoRA rank 1, 800 tokens, batch 1",
        "B-PPO, gpt2, LoRA rank 8, engine.gradient_checkpointing=True, 800 tokens, batch 4",
    ]


def test_the_files_depend_on_the_frame_alone(tmp_path: Path) -> None:
    first = draw_plan(frame(), tmp_path / "a", caption="tiny", limit_bytes=None)
    second = draw_plan(frame(), tmp_path / "b", caption="tiny", limit_bytes=None)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
