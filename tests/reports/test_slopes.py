from __future__ import annotations

import io
import math
import re

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from rlhfreports.slopes import slope_table

PAIRS = ((16, 16), (32, 32), (64, 64), (128, 128))


def power(prompt_len, completion_len, batch_size, **other):
    """A case whose decode grows as prompt^0.5, update as batch^0.75 · length^1.25, total as length^2."""
    length = prompt_len + completion_len
    blocks = {
        "generate_phase_block_s": [3.0 * completion_len * prompt_len**0.5] * 2,
        "update_block_s_per_sample": [2.0 * batch_size**-0.25 * length**1.25] * 2,
        "total_block_s_per_sample": [5.0 * length**2.0] * 2,
    }
    return {
        **blocks,
        "prompt_len": prompt_len,
        "completion_len": completion_len,
        "batch_size": batch_size,
        "generate_phase_s": 3.0 * completion_len * prompt_len**0.5,
        "update_s_per_sample": 2.0 * batch_size**-0.25 * length**1.25,
        "total_s_per_sample": 5.0 * length**2.0,
        **other,
    }


def slopes(table, quantity, against):
    rows = table.frame[(table.frame["quantity"] == quantity) & (table.frame["against"] == against)]
    return {row["held"]: pytest.approx(row["slope"], abs=1e-12) for row in rows.to_dict("records")}


def test_known_slopes_come_out_at_fixed_completion_length(make_frame):
    frame = make_frame(*(power(p, 32, b) for b in (1, 4) for p in (16, 48, 96, 224)))
    table = slope_table(frame)
    assert slopes(table, "decode s/token", "prompt length") == {f"batch {b}, completion 32": 0.5 for b in (1, 4)}
    held = {f"batch {b}, completion 32" for b in (1, 4)}
    assert slopes(table, "update s/step", "sequence length") == dict.fromkeys(held, 1.25)
    assert slopes(table, "total s/sample", "sequence length") == dict.fromkeys(held, 2.0)
    assert slopes(table, "update s/step", "batch size") == {f"length {p}+32": 0.75 for p in (16, 48, 96, 224)}
    assert (table.frame["num_points"] == np.where(table.frame["against"] == "batch size", 2, 4)).all()
    assert table.frame.loc[0, ["smallest", "largest"]].tolist() == [16, 224]


def test_lengths_that_grow_in_proportion_are_one_line_against_the_sequence_length(make_frame):
    table = slope_table(make_frame(*(power(*pair, 1) for pair in PAIRS)))
    assert set(table.frame["against"]) == {"sequence length"}
    assert slopes(table, "decode s/token", "sequence length") == {"batch 1": 0.5}
    # Odd lengths split as the command line splits them are in proportion too.
    odd = slope_table(make_frame(*(power(n // 2, n - n // 2, 1) for n in (7, 8, 33))))
    assert slopes(odd, "total s/sample", "sequence length") == {"batch 1": 2.0}


def test_cases_of_different_shape_are_not_fitted_together(make_frame):
    # One mostly prompt, one mostly completion: no line goes through both.
    assert slope_table(make_frame(power(90, 10, 1), power(20, 180, 1))).frame.empty
    # Other batch sizes at other lengths: neither length nor batch is held.
    assert slope_table(make_frame(power(16, 16, 1), power(32, 32, 4))).frame.empty
    # Equal sizes of different cases.
    for other in ({"method": "lora"}, {"dtype": "bfloat16"}, {"setting": "paper"}, {"options": "kl_coef=1"}):
        assert slope_table(make_frame(power(16, 16, 1), power(32, 32, 1, **other))).frame.empty, other


def test_prompts_and_completions_each_make_lines_of_their_own(make_frame):
    grid = (8, 16, 32)
    table = slope_table(make_frame(*(power(p, c, 1) for p in grid for c in grid)))
    held = {f"batch 1, {name} {n}" for name in ("completion", "prompt") for n in grid}
    assert set(slopes(table, "total s/sample", "sequence length")) == held
    assert set(slopes(table, "decode s/token", "prompt length")) == {f"batch 1, completion {n}" for n in grid}


def test_standard_error_is_the_textbooks_and_absent_for_two_points(make_frame):
    times = [1.0, 2.1, 3.7, 9.0]
    rows = [power(*pair, 1, total_s_per_sample=time) for pair, time in zip(PAIRS, times, strict=True)]
    frame = slope_table(make_frame(*rows)).frame
    row = frame[frame["quantity"] == "total s/sample"].iloc[0]
    x, y = np.log([float(sum(pair)) for pair in PAIRS]), np.log(times)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    rest = y - y.mean() - slope * (x - x.mean())
    assert row["slope"] == pytest.approx(slope, rel=1e-12)
    assert row["standard_error"] == pytest.approx(np.sqrt((rest**2).sum() / 2 / ((x - x.mean()) ** 2).sum()), rel=1e-9)
    assert row["r_squared"] == pytest.approx(1 - (rest**2).sum() / ((y - y.mean()) ** 2).sum(), rel=1e-9)
    two = slope_table(make_frame(*rows[:2])).frame
    assert two["slope"].notna().all()
    assert two[["standard_error", "r_squared"]].isna().all(axis=None)


def test_the_interval_of_a_slope_comes_from_a_fit_for_each_block(make_frame):
    """Blocks with slopes 1, 1.5 and 2; a block that one point lacks is left out."""
    rows = []
    for prompt_len in (16, 64):
        length = 2 * prompt_len
        blocks = [length**1.0, length**1.5, None if prompt_len == 16 else 7.0, length**2.0]
        rows.append({"prompt_len": prompt_len, "total_block_s_per_sample": blocks, "total_s_per_sample": length**1.5})
    (row,) = slope_table(make_frame(*rows)).frame.to_dict("records")[-1:]
    low, high = stats.t.interval(0.95, 2, loc=1.5, scale=0.5 / math.sqrt(3))
    assert row["slope"] == pytest.approx(1.5)
    assert row["half_width"] == pytest.approx((high - low) / 2)


def test_equal_times_have_slope_zero_and_no_r_squared(make_frame):
    frame = slope_table(make_frame(*(power(*pair, 1, total_s_per_sample=2.0) for pair in PAIRS))).frame
    row = frame[frame["quantity"] == "total s/sample"].iloc[0]
    assert row["slope"] == 0
    assert pd.isna(row["r_squared"])


def test_unmeasured_cases_are_no_points(make_frame):
    rows = [power(*pair, 1) for pair in PAIRS]
    rows[1] = {"prompt_len": 32, "outcome": "oom"}
    rows[2]["generate_phase_s"] = None
    points = slope_table(make_frame(*rows)).frame.set_index("quantity")["num_points"].to_dict()
    assert points == {"decode s/token": 2, "update s/step": 3, "total s/sample": 3}
    without = [{key: value for key, value in row.items() if "phase" not in key} for row in rows]
    assert "decode s/token" not in slope_table(make_frame(*without)).frame["quantity"].tolist()
    assert slope_table(make_frame()).frame.empty


def test_phases_that_a_method_lacks_give_no_slope(make_frame, other_shapes):
    rows = [{**power(*pair, 1), **shape} for pair in PAIRS for shape in other_shapes]
    for row in rows:
        if row["method"] != "best-of-n":
            row["generate_phase_s"] = None
    found = slope_table(make_frame(*rows)).frame.groupby("method")["quantity"].agg(list).to_dict()
    assert found == {
        "sft": ["update s/step", "total s/sample"],
        "dpo": ["update s/step", "total s/sample"],
        "best-of-n": ["decode s/token", "total s/sample"],
    }


def test_the_terminal_has_one_row_per_method_and_setting(make_frame):
    rows = [
        power(*pair, b, method=method, setting=setting)
        for pair in PAIRS
        for b in (1, 2)
        for setting in ("paper", "modern")
        for method in ("hydra", "lora")
    ]
    table = slope_table(make_frame(*rows))
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table.rich())
    text = console.export_text()
    found = [" ".join(line.split()) for line in text.splitlines() if "-PPO" in line]
    cells = "0.50 ±0.00 0.75 ±0.00 1.25 ±0.00 2.00 ±0.00"
    assert found == [f"{m} {s} {cells}" for m in ("LoRA-PPO", "Hydra-PPO") for s in ("modern", "paper")]
    assert "length 128+128" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_terminal_keeps_the_order_of_methods(make_frame, other_shapes):
    order = {"sft": 5, "dpo": 6, "best-of-n": 7}
    rows = [
        {**power(*pair, 1), **shape, "method_order": order[shape["method"]]} for pair in PAIRS for shape in other_shapes
    ]
    for row in rows:
        if row["method"] != "best-of-n":
            row["generate_phase_s"] = None
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(slope_table(make_frame(*rows)).rich())
    first_words = [line.split()[0] for line in console.export_text().splitlines() if line.strip()]
    assert [word for word in first_words if word in order] == ["sft", "dpo", "best-of-n"]


def test_held_sizes_that_differ_stand_in_the_cells(make_frame):
    rows = [power(*pair, 1, method="lora") for pair in PAIRS] + [power(*pair, 2) for pair in PAIRS]
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(slope_table(make_frame(*rows)).rich())
    text = console.export_text()
    assert "2.00 ±0.00 (batch 1)" in text
    assert "2.00 ±0.00 (batch 2)" in text


def test_the_files_have_every_line(make_frame):
    table = slope_table(make_frame(*(power(*pair, b) for pair in PAIRS for b in (1, 2))))
    line = "| Hydra-PPO | total s/sample | sequence length | batch 2 | 32–256 | 4 | 2.000 | 0.000 | 0.000 | 1.000 |"
    assert line in re.sub(" +", " ", table.markdown())
    read = pd.read_csv(io.StringIO(table.csv()))
    assert len(read) == len(table.frame) == 2 + 4 + 2 + 2
