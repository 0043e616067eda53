from __future__ import annotations

import csv
import io
import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rlhfreports.memory import interval_texts
from rlhfreports.memory import table as memory_table
from rlhfreports.tables import ABSENT, decimals_for, number_text

GIB = 2**30


def cells(table) -> list[dict[str, str]]:
    return [dict(zip(table.headings, row, strict=True)) for row in table.rows]


def test_columns_match_the_papers_table(make_frame):
    frame = make_frame(
        {
            "prompt_len": 400,
            "batch_size": 4,
            "model": "llama-7b",
            "model_bytes": round(15.9 * GIB),
            "activation_bytes": round(52.8 * GIB),
            "rollout_bytes": round(2.4 * GIB),
            "process_peak_bytes": round(74.25 * GIB),
            "inference_s_per_sample": 4.88,
            "update_s_per_sample": 1.59,
            "total_s_per_sample": 6.47,
        }
    )
    table = memory_table(frame)
    assert table.headings == (
        "method",
        "batch",
        "model GiB",
        "activation GiB",
        "rollout GiB",
        "total GiB",
        "process GiB",
        "inference s",
        "update s",
        "total s/sample",
    )
    assert table.rows == (("Hydra-PPO", "4", "15.9", "52.8", "2.4", "71.1", "74.2", "4.88", "1.59", "6.47"),)
    assert table.caption == "llama-7b · cpu · float32 · LoRA rank 16 · 800 tokens"


def test_preparing_is_a_column_of_its_own_where_some_row_has_it(make_frame):
    prepared = {"method": "dpo", "prepare_s_per_sample": 0.5, "inference_s_per_sample": None}
    table = memory_table(make_frame(prepared, {"method": "hydra"}))
    found = {row["method"]: row for row in cells(table)}
    assert table.headings[-4:] == ("prepare s", "inference s", "update s", "total s/sample")
    assert (found["dpo"]["prepare s"], found["dpo"]["inference s"]) == ("0.50", ABSENT)
    assert found["Hydra-PPO"]["prepare s"] == ABSENT
    assert "prepare s" not in memory_table(make_frame({"method": "hydra"})).headings


def test_settings_of_a_method_are_adjacent_rows(make_frame):
    paper = {"setting": "paper", "dtype": "bfloat16", "lora_rank": 128}
    rows = [
        {"method": method, "batch_size": batch, **setting}
        for setting in (paper, {})
        for batch in (1, 2)
        for method in ("hydra", "full")
    ]
    table = memory_table(make_frame(*rows))
    assert table.headings[:3] == ("method", "setting", "batch")
    assert [row[:3] for row in table.rows] == [
        (title, setting, batch)
        for batch in ("1", "2")
        for title in ("PPO", "Hydra-PPO")
        for setting in ("modern", "paper")
    ]
    # A terminal draws a line under each block of equal size, not under each setting.
    assert table._section_ends() == [False] * 3 + [True] + [False] * 4
    assert "modern: float32, LoRA rank 16 · paper: bfloat16, LoRA rank 128" in table.caption
    assert "setting" in table.csv().splitlines()[0].split(",")
    assert "setting" not in memory_table(make_frame(paper)).headings


def test_rows_are_sorted_by_length_batch_and_method(make_frame):
    rows = [
        {"method": method, "prompt_len": length, "batch_size": batch}
        for length in (64, 8)
        for batch in (16, 2)
        for method in ("hydra", "full")
    ]
    table = memory_table(make_frame(*rows))
    expected = [
        (title, length, batch) for length in ("16", "128") for batch in ("2", "16") for title in ("PPO", "Hydra-PPO")
    ]
    assert [row[:3] for row in table.rows] == expected
    assert memory_table(make_frame(*reversed(rows))).rows == table.rows


def test_every_axis_that_varies_is_a_column(make_frame):
    table = memory_table(make_frame({"model": "tiny"}, {"model": "gpt2"}, {"model": "gpt2", "lora_rank": 4}))
    assert [(row["model"], row["LoRA rank"]) for row in cells(table)] == [("tiny", "16"), ("gpt2", "4"), ("gpt2", "16")]
    assert table.caption == "cpu · float32 · 64 tokens"


def test_one_total_length_split_in_two_ways_shows_the_split(make_frame):
    table = memory_table(
        make_frame(
            {"prompt_len": 48, "completion_len": 16}, {"prompt_len": 32, "completion_len": 32}, {"prompt_len": 8}
        )
    )
    assert [row["length"] for row in cells(table)] == ["8+8", "32+32", "48+16"]


@pytest.mark.parametrize(
    ("outcome", "word"),
    [("oom", "OOM"), ("timeout", "TIMEOUT"), ("crashed", "CRASHED"), ("invalid", "INVALID"), ("skipped", "SKIPPED")],
)
def test_an_unmeasured_case_has_a_row_with_its_outcome_and_a_note(make_frame, outcome, word):
    frame = make_frame(
        {"method": "full", "outcome": outcome, "error": "there is a reason.", "error_phase": "generate"},
        {"method": "hydra"},
    )
    table = memory_table(frame)
    row = cells(table)[0]
    assert row["total GiB"] == word
    assert {row[name] for name in table.headings if name.endswith((" s", "sample"))} == {ABSENT}
    assert row["model GiB"] == ABSENT
    assert table.notes == (f"PPO, batch 1: {word} in generate: there is a reason.",)
    assert table.notes[0] in table.markdown()
    assert table.unmeasured == (True, False)


def test_numbers_of_a_failed_case_are_not_shown(make_frame):
    frame = make_frame({"outcome": "oom", "model_bytes": 7 * GIB, "total_s_per_sample": 3.0}, {"method": "full"})
    row = cells(memory_table(frame))[1]
    assert (row["model GiB"], row["total GiB"], row["total s/sample"]) == (ABSENT, "OOM", ABSENT)


def test_an_absent_number_is_a_dash(make_frame):
    row = cells(memory_table(make_frame({"update_s_per_sample": None}, {"method": "full"})))[1]
    assert row["update s"] == ABSENT


def test_phases_that_a_method_lacks_are_dashes(make_frame, other_shapes):
    rows = {row["method"]: row for row in cells(memory_table(make_frame({}, *other_shapes)))}
    times = {name: (row["inference s"], row["update s"], row["total s/sample"]) for name, row in rows.items()}
    assert times == {
        "Hydra-PPO": ("0.75", "0.25", "1.00"),
        "sft": (ABSENT, "1.00", "1.00"),
        "dpo": ("0.75", "0.25", "1.00"),
        "best-of-n": ("0.75", ABSENT, "1.00"),
    }


def test_notes_list_skipped_cases_last(make_frame):
    table = memory_table(
        make_frame({"outcome": "skipped", "error": "b."}, {"outcome": "oom", "error": "a.", "batch_size": 2})
    )
    assert [note.rsplit(": ", 1)[1] for note in table.notes] == ["a.", "b."]


def test_cut_prompts_give_a_note(make_frame):
    frame = make_frame({"num_prompts_truncated": 3}, {"num_prompts_truncated": 0, "method": "full"})
    assert "on the right: up to 3." in memory_table(frame).notes[0]
    assert memory_table(make_frame({"num_prompts_truncated": 0})).notes == ()


def test_cases_of_one_block_beside_cases_of_several_give_a_note(make_frame):
    rows = [{"num_timed_blocks": number, "batch_size": i + 1} for i, number in enumerate((1, 1, 4))]
    note = "2 cases timed in one block: no interval."
    assert note in memory_table(make_frame(*rows)).notes
    assert not any("timed in one block: no" in said for said in memory_table(make_frame(*rows[:2])).notes)


def test_csv_is_exact(make_frame):
    seconds, num_bytes = 0.1 + 0.2, 123_456_789_012_345_678
    frame = make_frame({"model_bytes": num_bytes, "total_s_per_sample": seconds}, {"method": "full", "outcome": "oom"})
    rows = list(csv.DictReader(io.StringIO(memory_table(frame).csv())))
    assert list(rows[0]) == list(frame.columns)
    oom, ok = rows
    assert int(ok["model_bytes"]) == num_bytes
    assert float(ok["total_s_per_sample"]) == seconds
    assert (oom["outcome"], oom["model_bytes"], oom["total_s_per_sample"]) == ("oom", "", "")


def test_a_carriage_return_in_an_error_ends_no_line_of_the_csv(make_frame):
    frame = make_frame({"method": "full"}, {"outcome": "crashed", "error": "50 %\r100 %"})
    rows = list(csv.DictReader(io.StringIO(memory_table(frame).csv())))
    assert [row["error"] for row in rows] == ["", "50 % 100 %"]


def test_markdown_is_one_table_of_equally_wide_lines(make_frame):
    lines = memory_table(make_frame({"model": "a|b"}, {"model": "tiny", "method": "full"})).markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4
    assert len({len(line) for line in table}) == 1
    # An escaped bar stays inside its cell.
    assert {line.replace("\\|", "").count("|") for line in table} == {12}
    assert table[1].split("|")[-2].strip().endswith("-:")


def test_a_run_without_records_gives_a_table_without_rows(make_frame):
    table = memory_table(make_frame())
    assert table.rows == ()
    assert table.caption == ""
    assert table.markdown().startswith("| method ")


def test_five_methods_at_two_sizes_fit_a_terminal_of_80_columns(make_frame):
    frame = make_frame(
        *(
            {
                "method_title": "Dynamic-LoRA-PPO",
                "prompt_len": n,
                "model_bytes": GIB // 10,
                "process_peak_bytes": 3 * GIB,
                "total_s_per_sample": 0.0312,
            }
            for n in (512, 1024)
        )
    )
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(memory_table(frame).rich())
    lines = console.export_text().splitlines()
    rows = [line for line in lines if "Dynamic-LoRA-PPO" in line]
    assert len(rows) == 2
    assert rows[0].split()[1:3] == ["1024", "1"]
    assert rows[0].split()[-1] == "0.0312"


def test_the_terminal_shows_eight_notes_and_counts_the_rest(make_frame):
    frame = make_frame(*({"batch_size": n, "outcome": "oom", "error": "full."} for n in range(1, 31)))
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(memory_table(frame).rich())
    text = console.export_text()
    assert text.count("full.") == 8
    assert "22 more notes" in text


def test_markup_in_names_is_printed_as_it_is(make_frame):
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(memory_table(make_frame({"model": "[red]x", "outcome": "crashed", "error": "[/] is bad."})).rich())
    assert "[red]x" in (text := console.export_text())
    assert "[/] is bad." in text


@given(
    st.lists(st.floats(min_value=1e-9, max_value=1e6), min_size=1),
    st.integers(0, 2),
    st.integers(2, 5),
)
def test_the_smallest_value_keeps_two_digits_at_least(values, least, most):
    decimals = decimals_for(values, least, most)
    assert decimals >= least
    smallest = min(values)
    assert abs(float(f"{smallest:.{decimals}f}") - smallest) <= 0.051 * smallest


@given(st.floats(min_value=0, max_value=1e9), st.integers(1, 6))
def test_a_printed_number_is_right_and_zero_only_for_zero(value, decimals):
    text = number_text(value, decimals)
    if text.startswith("<"):
        assert 0 < value < float(text[1:])
    else:
        assert math.isclose(float(text), value, abs_tol=0.500001 * 10**-decimals)
        assert (float(text) == 0) == (value == 0)


@pytest.mark.parametrize(("seconds", "text"), [(1.23456, "1.235"), (0.05, "0.050"), (0.0004, "0.00040")])
def test_seconds_without_an_interval_have_three_decimals_and_at_least_two_digits(seconds, text):
    values = pd.Series([seconds])
    assert interval_texts(values, values, pd.Series([None], dtype="Float64")) == [text]


def test_the_frame_of_the_table_has_all_rows(make_frame):
    frame = make_frame({"batch_size": 2}, {"batch_size": 1, "outcome": "oom"})
    pd.testing.assert_frame_equal(memory_table(frame).frame, frame.iloc[[1, 0]].reset_index(drop=True))


def test_allocator_memory_beyond_the_ledger_gives_a_note(make_frame):
    mib = 2**20
    rows = [{"allocator_rest_bytes": rest * mib, "workspace_bytes": 64 * mib} for rest in (128, 512)]
    (note,) = memory_table(make_frame(*rows)).notes
    assert note == (
        "At its own peak CUDA's allocator had handed out 0.125 to 0.500 GiB beyond these totals and up to 0.062 GiB of "
        "libraries' workspaces."
    )
    assert memory_table(make_frame({})).notes == ()
