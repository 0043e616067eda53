from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rlhfreports.scaling import draw_scaling, planned_table, ranks_table, scaling_figure, scaling_table

Make = Callable[..., pd.DataFrame]
Ranked = Callable[..., dict[str, Any]]
STAGE_2 = {"parallel": "deepspeed", "zero_stage": 2}
KNOWN = {"waiting_share": None, "imbalance": None, "total_half_width_s_per_sample": 0.05}


def test_the_table_of_lines(make_frame: Make, ranked: Ranked) -> None:
    frame = make_frame(ranked(2, 4, 1.0, **STAGE_2), ranked(4, 4, 0.625, **STAGE_2, **KNOWN))
    table = scaling_table(frame)
    shared = ("weak", "Hydra-PPO", "ZeRO-2", "64", "4")
    assert table.rows == (
        (*shared, "2", "1.00x", "100 %", "1.500", "1.000", "–", "25 %", "12 %", "1.00", "3"),
        (*shared, "4", "1.60x", "80 %", "1.500", "0.62", "0.05", "–", "–", "1.00", "3"),
    )
    assert "| ZeRO-2" in table.markdown()
    assert table.csv().splitlines()[0].startswith("method,method_title,strategy,seq_len,")


def test_a_speed_up_has_the_interval_of_its_blocks(make_frame: Make, ranked: Ranked) -> None:
    blocks = ([2.0, 2.1, 1.9], [1.0, 1.0, 1.0])
    frame = make_frame(
        *(ranked(2**i, 4, values[0], total_block_s_per_sample=values) for i, values in enumerate(blocks))
    )
    table = scaling_table(frame)
    assert table.cells["speed-up"].tolist() == ["1.00x", "2.0x (1.8 to 2.3)"]
    low, high = (float(table.frame[f"speed_up_{end}"].iloc[1]) for end in ("low", "high"))
    # 2 exp(± 4.303 s / √3), with s = 0.0501, the standard deviation of ln 2.0, ln 2.1 and ln 1.9.
    assert (low, high) == pytest.approx((1.7647, 2.2629), abs=1e-4)


def test_the_table_of_all_cases_over_ranks(make_frame: Make, ranked: Ranked) -> None:
    failed = ranked(2, 4, 1.0, **STAGE_2, outcome="oom", error="no memory.", total_s_per_sample=None)
    unknown = dict.fromkeys(("waiting_share", "imbalance", "communication_bytes", "communication_calls"))
    frame = make_frame(
        {}, failed | unknown | {"base_part_bytes": None, "activations_part_bytes": None}, ranked(2, 4, 1.0)
    )
    table = ranks_table(frame)
    assert table.headings[5:8] == ("base GiB", "activations GiB", "total GiB")
    shared = ("64", "4", "2")
    assert table.rows == (
        ("Hydra-PPO", "DDP", *shared, "1.00", "0.50", "1.50", "1.000", "–", "25 %", "12 %", "1.00", "3"),
        ("Hydra-PPO", "ZeRO-2", *shared, "–", "–", "OOM", "–", "–", "–", "–", "–", "–"),
    )
    assert "no memory." in table.csv()


def test_cases_that_differ_in_split_model_or_options_can_be_told_apart(make_frame: Make, ranked: Ranked) -> None:
    frame = make_frame(
        *(ranked(size, 4, 1.0, prompt_len=length, completion_len=64 - length, model=model, others=options)
          for length in (16, 32)
          for model in ("tiny", "gpt2")
          for options in ("lora.alpha=2, ppo.num_ppo_epochs=1", "lora.alpha=2, ppo.num_ppo_epochs=2")
          for size in (1, 2)),
    )  # fmt: skip
    names = ("method", "ranks share by", "prompt", "completion", "model", "options")
    names += ("tokens", "batch of a rank", "ranks")
    first = ("Hydra-PPO", "DDP", "16", "48", "tiny", "ppo.num_ppo_epochs=1", "64", "4", "1")
    for table, before in (
        (ranks_table(frame), ()),
        (scaling_table(frame), ("weak",)),
        (planned_table(frame.assign(predicted_total_bytes=2**30), frame.iloc[:0]), ()),
    ):
        num_names = len(before) + len(names)
        assert table.headings[len(before) : num_names] == names
        assert table.rows[0][:num_names] == (*before, *first)
        assert len({row[:num_names] for row in table.rows}) == len(table.rows) == 16
        assert table.num_text_columns == len(before) + 6
        assert "worst_rank,prompt_len,completion_len,model,options," in table.csv().splitlines()[0]


def test_no_case_over_ranks_gives_empty_tables(make_frame: Make) -> None:
    for table in (ranks_table(make_frame({})), scaling_table(make_frame({}))):
        assert len(table.frame) == len(table.cells) == 0


def test_the_figure_has_panels_a_size_and_a_line_for_each_method_and_strategy(
    make_frame: Make, ranked: Ranked, tmp_path: Path
) -> None:
    frame = make_frame(
        *(ranked(size, 4, 1.0 / size, method=method, prompt_len=prompt_len, **how)
          for method in ("hydra", "lora")
          for how in ({"parallel": "ddp"}, {"parallel": "fsdp"})
          for prompt_len in (32, 64)
          for size in (1, 2)),
    )  # fmt: skip
    panels = scaling_figure(frame).axes
    assert [panel.get_title().split("\n")[0] for panel in panels[::3]] == [
        "weak: 64 tokens, batch 4",
        "weak: 128 tokens, batch 4",
    ]
    assert [len(panel.lines) for panel in panels] == [4] * 6
    assert len({(line.get_color(), line.get_marker()) for line in panels[0].lines}) == 4
    assert list(panels[0].lines[0].get_ydata()) == [1.0, 0.5]
    assert list(panels[2].lines[0].get_ydata()) == [25.0, 25.0]
    png, svg = draw_scaling(frame, tmp_path / "scaling")
    assert png.stat().st_size > 10_000
    assert svg.read_text().startswith("<?xml")


def test_of_many_sizes_a_picture_draws_eight_and_says_so(make_frame: Make, ranked: Ranked) -> None:
    frame = make_frame(*(ranked(size, 4, 1.0 / size, prompt_len=n) for n in range(1, 10) for size in (1, 2)))
    figure = scaling_figure(frame)
    assert len(figure.axes) == 8 * 3
    assert any("8 of 9 sizes: the page has all" in text.get_text() for text in figure.texts)
    few = scaling_figure(frame[frame["prompt_len"] < 9])
    assert len(few.axes) == 8 * 3
    assert not any("sizes" in text.get_text() for text in few.texts)


def test_the_table_of_plans(make_frame: Make, ranked: Ranked) -> None:
    gib = 2**30
    frame = make_frame(ranked(2, 4, 1.0, **STAGE_2))
    planned = ranked(8, 4, 1.0, **STAGE_2, outcome=None, total_bytes=gib)
    plans = make_frame(ranked(2, 4, 1.0, **STAGE_2, outcome=None, total_bytes=gib), planned)
    table = planned_table(frame, plans)
    shared = ("Hydra-PPO", "ZeRO-2", "64", "4")
    assert table.rows == ((*shared, "2", "1.00", "1.50", "-33.33"), (*shared, "8", "1.00", "–", "–"))
    assert (
        table.csv()
        .splitlines()[0]
        .endswith(
            "planned_bytes,measured_bytes,error_percent,total_s_per_sample,"
            "waiting_share,imbalance,communication_bytes,communication_calls"
        )
    )
