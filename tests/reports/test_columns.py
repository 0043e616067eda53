from __future__ import annotations

import pandas as pd

from rlhfreports.columns import (
    as_one_machine,
    axes_that_vary,
    differing_words,
    hosts_note,
    hosts_of,
    methods_in_order,
    one_machine_note,
    parts_of,
    setting_order,
    shared_axes_text,
    time_notes,
    with_short_options,
)
from rlhfreports.gain import has_gain
from rlhfreports.slopes import slope_table


def test_parts_come_from_the_column_names_in_order():
    frame = pd.DataFrame(columns=["total_bytes", "heads_part_bytes", "base_part_bytes", "rollout_bytes"])
    assert parts_of(frame) == ["heads", "base"]


def test_axes_that_vary_count_an_absent_value_as_a_value(make_frame):
    frame = make_frame({"lora_rank": 16}, {"lora_rank": None}, {"lora_rank": 16})
    assert axes_that_vary(frame) == ["lora_rank"]


def test_the_caption_has_only_axes_that_all_rows_share(make_frame):
    frame = make_frame(
        {"dtype": "float32", "options": "attention=eager"}, {"dtype": "bfloat16", "options": "attention=eager"}
    )
    assert shared_axes_text(frame) == "tiny · cpu · LoRA rank 16 · attention=eager"


def test_a_long_path_in_the_caption_keeps_its_end(make_frame):
    frame = make_frame({"model": "/somewhere/" + "deep/" * 30 + "my-checkpoint"})
    assert "my-checkpoint" in shared_axes_text(frame)
    assert len(shared_axes_text(frame)) < 110


PAPER = {"setting": "paper", "dtype": "bfloat16", "lora_rank": 128}


def test_axes_that_follow_from_the_setting_are_named_with_it(make_frame):
    frame = make_frame(PAPER, {})
    assert axes_that_vary(frame) == ["setting"]
    assert shared_axes_text(frame) == "tiny · cpu · modern: float32, LoRA rank 16 · paper: bfloat16, LoRA rank 128"
    other = make_frame(PAPER, {}, {"dtype": "bfloat16"})
    assert axes_that_vary(other) == ["dtype", "setting"]
    assert shared_axes_text(other) == "tiny · cpu · modern: LoRA rank 16 · paper: LoRA rank 128"


def test_a_single_setting_is_named_unless_it_is_the_default(make_frame):
    assert shared_axes_text(make_frame(PAPER)) == "tiny · cpu · bfloat16 · LoRA rank 128 · setting paper"
    assert "setting" not in shared_axes_text(make_frame({}))
    assert "setting" not in shared_axes_text(make_frame({"setting": "custom", "options": "attention=eager"}))


def test_custom_and_default_cases_differ_by_options_not_setting(make_frame):
    frame = make_frame({"setting": "custom", "options": "attention=eager"}, {})
    assert axes_that_vary(frame) == ["options"]
    assert "setting" in axes_that_vary(make_frame({"setting": "custom"}, {}, PAPER))


def test_settings_are_sorted_by_their_order_with_custom_last(make_frame):
    assert setting_order(make_frame({"setting": "custom"}, PAPER, {})) == ["modern", "paper", "custom"]


def test_methods_are_sorted_by_their_order_with_unlisted_ones_last(make_frame):
    frame = make_frame({"method": "mine"}, {"method": "hydra"}, {"method": "full"}, {"method": "hydra"})
    assert methods_in_order(frame)["method"].tolist() == ["full", "hydra", "mine"]


def test_times_of_two_machines_are_not_compared(make_frame):
    rows = [
        {"method": m, "prompt_len": p, "batch_size": b} for m in ("lora", "hydra") for p in (32, 64) for b in (1, 2)
    ]
    one = make_frame(*({**row, "host": "a"} for row in rows))
    assert (hosts_note(one), axes_that_vary(one), has_gain(one)) == (None, [], True)
    assert len(slope_table(one).frame)
    by_size = make_frame(*({**row, "host": f"{row['method']} {row['prompt_len']} {row['batch_size']}"} for row in rows))
    assert not has_gain(by_size)
    assert len(slope_table(by_size).frame) == 0
    two = make_frame(*({**row, "host": row["method"]} for row in rows))
    assert axes_that_vary(two) == ["host"]
    assert not has_gain(two)
    assert set(slope_table(two).frame["host"]) == {"lora", "hydra"}
    note = "Cases were measured on 2 machines (lora, hydra): times are compared only between cases of one machine."
    assert hosts_note(two) == note
    assert note in slope_table(two).notes


def test_times_under_two_conditions_are_not_compared(make_frame):
    rows = [{"method": m, "batch_size": b} for m in ("lora", "hydra") for b in (1, 2)]
    one = make_frame(*rows)
    assert (time_notes(one), has_gain(one)) == ([], True)
    words = ["the start", "the start", "resumption 1", "resumption 1"]
    columns = {"conditions": words, "conditions_differ": ["", "", "threads 1 instead of 2", "threads 1 instead of 2"]}
    two = make_frame(*rows).assign(**{name: pd.array(texts, dtype="string") for name, texts in columns.items()})
    assert axes_that_vary(two) == ["conditions"]
    assert not has_gain(two)
    slopes = slope_table(two)
    assert slopes.frame["conditions"].tolist() == ["the start", "resumption 1"]
    note = (
        "The run was resumed under other conditions (resumption 1: threads 1 instead of 2): times are compared only "
        "between cases of the same conditions."
    )
    assert time_notes(two) == [note]
    assert slopes.notes == (note,)
    assert "conditions" not in slope_table(one).frame
    assert differing_words(two.iloc[-1].to_dict(), two) == ["conditions of resumption 1"]


def test_a_case_that_was_not_measured_makes_no_second_machine(make_frame):
    frame = make_frame({"host": "a"}, {"host": "b", "outcome": "skipped"})
    assert axes_that_vary(frame) == []


def test_hosts_that_are_said_to_be_one_machine_are_one_and_a_note_says_so(
    make_frame,
):
    frame = as_one_machine(make_frame({"host": "c1"}, {"host": "c2"}, {"host": None}), ["c1", "c2"])
    assert hosts_of(frame) == ["c1 = c2"]
    assert "host" not in axes_that_vary(frame)
    note = "The hosts c1 = c2 count as one machine because --same-machine says so: the records cannot tell."
    assert hosts_note(frame) == one_machine_note(frame) == note
    assert one_machine_note(make_frame({"host": "c1"})) is None


def test_options_that_all_rows_have_stand_in_the_caption_and_not_in_words_about_a_row(make_frame):
    frame = make_frame(
        {"options": "parallel.strategy=ddp, parallel.world_size=2"},
        {"options": "parallel.strategy=deepspeed, parallel.world_size=2, parallel.zero_stage=3"},
        {"options": "parallel.world_size=2"},
    )
    assert with_short_options(frame)["options"].tolist() == [
        "parallel.strategy=ddp",
        "parallel.strategy=deepspeed, parallel.zero_stage=3",
        "",
    ]
    assert shared_axes_text(frame) == "tiny · cpu · float32 · LoRA rank 16 · parallel.world_size=2"
    differing = make_frame({"options": "a=1"}, {"options": ""})
    assert with_short_options(differing) is differing
    assert shared_axes_text(make_frame({"options": "a=1"})).endswith(" · a=1")
