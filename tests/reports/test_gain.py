from __future__ import annotations

import dataclasses
import io
import math
import re

import pandas as pd
import pytest
from rich.console import Console

from rlhfreports.gain import gain_table, has_gain

GIB = 2**30


def case(method, batch_size, seconds, gib, **other):
    """A measured row of ``gib`` GiB in all, or an unmeasured one for an outcome in place of seconds."""
    if isinstance(seconds, str):
        return {"method": method, "batch_size": batch_size, "outcome": seconds, **other}
    sizes = {"model_bytes": int(gib * GIB), "activation_bytes": 0, "rollout_bytes": 0}
    blocks = {"total_s_per_sample": seconds, "total_block_s_per_sample": [seconds] * 3}
    return {"method": method, "batch_size": batch_size, **blocks, **sizes, **other}


LORA = (case("lora", 1, 16.0, 6), case("lora", 2, 8.0, 8), case("lora", 4, "oom", 0))
# At batch 2 half the time; batch 4 and 8 fit into the 8 GiB of lora, 16 does not.
HYDRA = (
    case("hydra", 2, 4.0, 3),
    case("hydra", 4, 3.0, 5),
    case("hydra", 8, 1.0, 8),
    case("hydra", 16, 0.5, 9),
)


def test_factors_and_shares_of_a_gain_are_exact(make_frame):
    (row,) = gain_table(make_frame(*LORA, *HYDRA)).frame.to_dict("records")
    assert (row["method"], row["baseline"], row["baseline_title"]) == ("hydra", "lora", "LoRA-PPO")
    assert (row["baseline_batch_size"], row["memory_bytes"], row["batch_size"]) == (2, 8 * GIB, 8)
    gains = (row["shared_pass_gain"], row["larger_batch_gain"], row["whole_gain"])
    assert gains == pytest.approx((2.0, 4.0, 8.0), rel=1e-12)
    # 8 = 2 · 2²: a third and two thirds of three doublings.
    assert row["shared_pass_share"] == pytest.approx(1 / 3, rel=1e-12)
    assert row["larger_batch_share"] == pytest.approx(2 / 3, rel=1e-12)


def test_each_length_setting_and_method_has_its_own_row(make_frame):
    rows = []
    for prompt_len in (64, 32):
        for setting, slow in (("paper", 3.0), ("modern", 1.0)):
            other = {"prompt_len": prompt_len, "setting": setting}
            for method in ("lora", "hydra", "full"):
                rows += [case(method, 1, slow * 2, 4, **other), case(method, 2, slow * 1, 4, **other)]
    frame = make_frame(*rows)
    table = gain_table(frame)
    assert table.headings[:3] == ("method", "setting", "length")
    found = [(row[0], row[1], row[2]) for row in table.rows]
    assert found == [
        (method, setting, length)
        for length in ("64", "128")
        for setting in ("modern", "paper")
        for method in ("PPO", "Hydra-PPO")
    ]
    assert (table.frame["whole_gain"] == 1).all()
    # Nothing was gained: there is nothing to share.
    assert table.frame[["shared_pass_share", "larger_batch_share"]].isna().all(axis=None)


def test_a_loss_in_one_part_gives_the_other_a_share_above_one(make_frame):
    frame = make_frame(case("lora", 1, 4.0, 8), case("hydra", 1, 8.0, 4), case("hydra", 2, 2.0, 6))
    (row,) = gain_table(frame).frame.to_dict("records")
    assert (row["shared_pass_gain"], row["larger_batch_gain"], row["whole_gain"]) == (0.5, 4.0, 2.0)
    assert (row["shared_pass_share"], row["larger_batch_share"]) == (-1.0, 2.0)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ((case("hydra", 1, 4.0, 3), case("hydra", 4, 3.0, 5)), "largest batch is 2, which was not run here."),
        (
            (case("hydra", 1, 4.0, 3), case("hydra", 2, "oom", 0), case("hydra", 4, 3.0, 5)),
            "largest batch is 2, which ended as OOM here.",
        ),
        ((case("hydra", 2, 4.0, 9), case("hydra", 4, 3.0, 10)), "no batch stays within the baseline's 8 GiB."),
    ],
)
def test_a_missing_measurement_gives_a_note_instead_of_a_row(make_frame, rows, says):
    table = gain_table(make_frame(*LORA, *rows))
    assert table.rows == ()
    (note,) = table.notes
    assert note.startswith("Hydra-PPO, 64 tokens: ")
    assert note.endswith(says)
    assert says in table.markdown()


@pytest.mark.parametrize(("more", "cell"), [((), "≥8"), ((HYDRA[3],), "8"), ((case("hydra", 16, "oom", 0),), "8")])
def test_an_untried_larger_batch_is_marked(make_frame, more, cell):
    table = gain_table(make_frame(*LORA, *HYDRA[:3], *more))
    assert [row[4] for row in table.rows] == [cell]
    assert ("no larger batch was run" in table.markdown()) is (not more)


@pytest.mark.parametrize(
    ("rows", "there_is"),
    [
        ((*LORA, *HYDRA), True),
        (HYDRA, False),
        (LORA, False),
        ((LORA[2], *HYDRA), False),
        ((LORA[0], HYDRA[0]), False),
        ((LORA[0], HYDRA[0], case("hydra", 4, "oom", 0)), False),
        ((LORA[0], *({**row, "dtype": "bfloat16"} for row in HYDRA)), False),
        ((LORA[0], *({**row, "prompt_len": 8, "completion_len": 56} for row in HYDRA)), False),
    ],
)
def test_a_gain_needs_the_baseline_and_two_batches_of_a_method(make_frame, rows, there_is):
    assert has_gain(make_frame(*rows)) is there_is


def test_a_row_without_total_bytes_does_not_count(make_frame):
    frame = make_frame(*LORA, *HYDRA)
    frame.loc[1, "total_bytes"] = pd.NA
    assert gain_table(frame).frame["baseline_batch_size"].tolist() == []  # batch 1 was not run with hydra
    assert "largest batch is 1, which was not run" in gain_table(frame).notes[0]


def test_a_gain_is_taken_within_one_family(make_frame, other_shapes):
    others = [{**shape, **case(shape["method"], b, 1.0, 4)} for shape in other_shapes for b in (1, 2)]
    assert not has_gain(make_frame(*LORA, *others))
    assert gain_table(make_frame(*LORA, *HYDRA, *others)).frame["method"].tolist() == ["hydra"]
    tuned = [{**row, "method": "dpo-lora"} for row in others if row["method"] == "dpo"]
    assert gain_table(make_frame(*others, *tuned), "dpo").frame["method"].tolist() == ["dpo-lora"]


def test_any_method_can_be_the_baseline(make_frame):
    frame = make_frame(case("full", 1, 6.0, 9), *LORA)
    (row,) = gain_table(frame, "full").frame.to_dict("records")
    assert (row["method"], row["baseline"], row["batch_size"], row["whole_gain"]) == ("lora", "full", 2, 0.75)
    assert not has_gain(frame, "hydra")


def test_the_files_and_the_terminal_say_the_same(make_frame):
    table = gain_table(make_frame(*LORA, *HYDRA))
    gains = " | ".join(f"{gain:.3f}x ({gain:.3f} to {gain:.3f})" for gain in (2, 4, 8))
    assert f"| Hydra-PPO | 64 | 2 | 8 | 8 | {gains} | 33 % | 67 % |" in re.sub(" +", " ", table.markdown())
    read = pd.read_csv(io.StringIO(table.csv()))
    assert math.isclose(read.loc[0, "shared_pass_share"], 1 / 3, rel_tol=1e-12)
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table.rich())
    assert (
        "Hydra-PPO 64 2 to 8 2.000x (2.000 to 2.000), 33 % 4.000x (4.000 to 4.000), 67 % 8.000x (8.000 to 8.000)"
        in " ".join(console.export_text(clear=False).split())
    )
    assert "cannot be divided" not in console.export_text()


def test_the_terminal_counts_the_gains_that_cannot_be_divided_and_no_other_note(make_frame):
    table = gain_table(make_frame(*LORA, case("hydra", 1, 4.0, 3), case("hydra", 4, 3.0, 5)))
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(dataclasses.replace(table, notes=(*table.notes, "Cases were measured on 2 machines.")).rich())
    assert "1 that cannot be divided: gain.md says why." in console.export_text()


def test_the_factors_of_blocks_that_are_set_aside_multiply_to_the_whole(make_frame):
    blocks = {
        ("lora", 4): [1.0, 1.1, 1.2, None, 1.0],
        ("hydra", 4): [None, 0.9, 1.0, 1.1, 0.9],
        ("hydra", 8): [0.5, None, 0.6, 0.7, 0.5],
    }
    frame = make_frame(
        *(case(name, size, 1.0, 8, total_block_s_per_sample=values) for (name, size), values in blocks.items())
    )
    (row,) = gain_table(frame).frame.to_dict("records")
    assert row["shared_pass_gain"] * row["larger_batch_gain"] == pytest.approx(row["whole_gain"])
    assert row["shared_pass_share"] + row["larger_batch_share"] == pytest.approx(1)


def test_a_larger_batch_that_crashed_does_not_say_whether_it_fits(make_frame):
    table = gain_table(make_frame(*LORA, *HYDRA[:3], case("hydra", 16, "crashed", 0)))
    assert [row[4] for row in table.rows] == ["≥8"]
