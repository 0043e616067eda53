from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest

from rlhfreports.paper import TABLE_1, conditions, is_the_papers, paper_cells, table_1, trlx_table, zero_table

Frames = Callable[..., pd.DataFrame]
GIB = 2**30
PAPERS = {"model": "llama-7b", "prompt_len": 400, "completion_len": 400, "setting": "paper", "lora_rank": 128}


@pytest.mark.parametrize("row", TABLE_1, ids=lambda row: row.method)
def test_the_papers_latencies_add_up(row: object) -> None:
    if row.total_s is not None:
        assert row.inference_s + row.update_s == pytest.approx(row.total_s)
    # The paper's totals have the parts that its two columns leave out.
    assert row.model_gib + row.activation_gib <= row.total_gib


def test_the_papers_numbers_stand_only_beside_cases_of_its_setting(make_frame: Frames) -> None:
    frame = make_frame(
        {"method": "hydra", "batch_size": 4, **PAPERS},
        {"method": "hydra", "batch_size": 4, **PAPERS, "setting": "modern"},
        {"method": "hydra", "batch_size": 2, **PAPERS},
        {"method": "hydra", "batch_size": 4, **PAPERS, "prompt_len": 300},
        {"method": "hydra", "batch_size": 4, **PAPERS, "model": "tiny"},
    )
    assert is_the_papers(frame).tolist() == [True, False, True, False, False]
    assert paper_cells(frame) == {
        "paper total GiB": ["71.1", "", "", "", ""],
        "paper s/sample": ["6.47", "", "", "", ""],
    }
    assert paper_cells(make_frame({})) == {}


def test_a_checkpoint_folder_of_the_model_counts_as_the_model(make_frame: Frames) -> None:
    assert is_the_papers(make_frame({**PAPERS, "model": "/models/Llama-7B/"})).tolist() == [True]


def test_table_1_takes_ratios_to_the_baseline_on_both_sides(make_frame: Frames) -> None:
    frame = make_frame(
        {"method": "lora", "batch_size": 1, "model_bytes": 2 * GIB, "activation_bytes": 0, "total_s_per_sample": 4.0},
        {"method": "hydra", "batch_size": 4, "model_bytes": GIB, "activation_bytes": 0, "total_s_per_sample": 1.0},
    )
    cells = table_1(frame).cells.set_index("method")
    assert cells.loc["Hydra-PPO", "total / LoRA-PPO, paper"] == "1.05"
    assert cells.loc["Hydra-PPO", "total / LoRA-PPO, ours"] == "0.50"
    assert cells.loc["Hydra-PPO", "s / LoRA-PPO, paper"] == "0.35"
    assert cells.loc["Hydra-PPO", "s / LoRA-PPO, ours"] == "0.25"
    assert cells.loc["PPO", "total GiB, ours"] == "–"
    assert cells.loc["LoRA-PPO", "our case"] == "64 tokens, batch 1"


def test_our_model_memory_is_what_the_paper_counts_as_the_model(make_frame: Frames) -> None:
    """All weights, gradients and optimizer states: the step's highest total is often without the gradients."""
    frame = make_frame({"method": "lora", "model_bytes": 2 * GIB, "persistent_model_bytes": 3 * GIB})
    assert table_1(frame).cells.set_index("method").loc["LoRA-PPO", "model GiB, ours"] == "3.000"


def test_the_table_tells_the_conditions_of_its_own_cases(make_frame: Frames) -> None:
    frame = make_frame({"method": "lora"}, {"method": "hydra", **PAPERS, "outcome": "oom"})
    others = "The run's conditions are others: model tiny, 64 tokens, setting modern."
    assert table_1(frame).explanation.startswith(others)
    failed = frame[frame["outcome"] == "oom"]
    assert table_1(failed).explanation.startswith("The run has cases at the paper's model")


def test_the_case_at_the_papers_conditions_is_preferred(make_frame: Frames) -> None:
    frame = make_frame(
        {"method": "hydra", "batch_size": 4, **PAPERS, "total_s_per_sample": 7.0},
        {"method": "hydra", "batch_size": 8, **PAPERS, "prompt_len": 800, "total_s_per_sample": 9.0},
    )
    cells = table_1(frame).cells.set_index("method")
    assert cells.loc["Hydra-PPO", "s/sample, ours"] == "7"
    assert conditions(frame).startswith("The run has cases at the paper's model")


def test_ratios_are_taken_on_one_machine_and_in_one_setting(make_frame: Frames) -> None:
    lora = {"method": "lora", "total_s_per_sample": 4.0, "host": "one"}
    frame = make_frame(
        lora,
        {**lora, "setting": "paper", "total_s_per_sample": 8.0},
        {"method": "hydra", "total_s_per_sample": 1.0, "host": "one"},
        {"method": "hydra", "total_s_per_sample": 1.0, "host": "two", "setting": "paper"},
    )
    cells = table_1(frame).cells.set_index("method")
    assert cells.loc["LoRA-PPO", "s/sample, ours"] == "8"
    assert cells.loc["Hydra-PPO", "s / LoRA-PPO, ours"] == "–"
    cells = table_1(frame[frame["setting"] == "modern"]).cells.set_index("method")
    assert cells.loc["Hydra-PPO", "s / LoRA-PPO, ours"] == "0.25"


@pytest.mark.parametrize("axis", ["lora_rank", "seed", "options"])
def test_ratios_are_taken_between_cases_that_differ_in_method_and_batch_alone(make_frame: Frames, axis: str) -> None:
    value, other = ("a=1", "a=2") if axis == "options" else (8, 16)
    frame = make_frame(
        {"method": "hydra", "total_s_per_sample": 1.0, axis: value},
        {"method": "hydra", "total_s_per_sample": 2.0, axis: other},
        {"method": "lora", "total_s_per_sample": 4.0, axis: value},
    )
    cells = table_1(frame).cells.set_index("method")
    assert cells.loc["Hydra-PPO", "s / LoRA-PPO, ours"] == "0.25"


def test_zero_1_at_the_numbers_of_ranks_that_were_run(
    make_frame: Frames, ranked: Callable[..., dict[str, object]]
) -> None:
    stage = {"parallel": "deepspeed", "zero_stage": 1}
    planned = {"predicted_persistent_model_bytes": 2 * GIB, "persistent_model_bytes": GIB, "predicted_total_bytes": GIB}
    frame = make_frame(
        ranked(4, 1, 0.5, **stage),
        ranked(2, 1, 1.0, **stage, **planned),
        ranked(2, 1, 1.0, **stage, method="full"),
        ranked(2, 1, 1.0, **stage, method="dpo"),
        ranked(2, 1, 1.0, parallel="deepspeed", zero_stage=2),
        {},
    )
    assert zero_table(frame).cells.to_numpy().tolist() == [
        ["PPO", "2", "64", "1", "111.8", "–", "–", "–", "1.500", "2"],
        ["Hydra-PPO", "2", "64", "1", "15.9", "2.000", "1.000", "1.000", "1.500", "2"],
        ["Hydra-PPO", "4", "64", "1", "15.9", "–", "–", "–", "1.500", "2"],
    ]
    assert zero_table(make_frame({})).cells.empty
    papers = ranked(2, 4, 1.0, **stage, **PAPERS)
    assert conditions(make_frame(papers)).endswith("its optimizer is divided by ZeRO-1 over 2 ranks.")


def test_other_conditions_are_named(make_frame: Frames) -> None:
    sentence = conditions(make_frame({}))
    assert sentence.startswith("The run's conditions are others: model tiny, 64 tokens, setting modern.")


def test_trlx_rows_take_the_fastest_ppo_case_of_their_model(make_frame: Frames) -> None:
    frame = make_frame(
        {"model": "facebook/opt-1.3b", "total_s_per_sample": 0.5},
        {"model": "facebook/opt-1.3b", "total_s_per_sample": 0.25, "prompt_len": 64},
        {"model": "facebook/opt-1.3b", "total_s_per_sample": 0.1, "family": "SFT", "method": "sft"},
    )
    assert trlx_table(frame).cells["ours"].tolist() == ["4 (Hydra-PPO, 128 tokens)", *["not run"] * 3]


def test_the_papers_figures_are_of_one_gpu_and_so_are_those_beside_them(make_frame: Frames) -> None:
    frame = make_frame(
        {"model": "opt-1.3b", "total_s_per_sample": 0.25},
        {"model": "opt-1.3b", "total_s_per_sample": 0.125, "world_size": 4},
        {"method": "lora", "batch_size": 1, **PAPERS, "total_s_per_sample": 2.5, "world_size": 8},
    )
    assert trlx_table(frame).cells["ours"][0] == "4 (Hydra-PPO, 64 tokens)"
    assert trlx_table(frame.iloc[1:]).cells["ours"][0] == "2 (Hydra-PPO, 64 tokens, 4 ranks)"
    assert table_1(frame).cells.set_index("method").loc["LoRA-PPO", "s/sample, ours"] == "20"
    # The memory table has the run's seconds over all ranks, which the paper's are not beside.
    assert paper_cells(frame) == {"paper total GiB": ["", "", "68.0"], "paper s/sample": ["", "", "–"]}


def test_a_run_without_measurements_has_dashes(make_frame: Frames) -> None:
    cells = table_1(make_frame({"outcome": "oom"})).cells
    assert set(cells["total GiB, ours"]) == {"–"}


@pytest.mark.parametrize(
    ("papers", "other"), [({"lora_rank": 128}, {"lora_rank": 16}), ({}, {"options": "ppo.num_ppo_epochs=4"})]
)
def test_of_several_of_the_papers_cases_its_rank_and_the_usual_options_come_first(
    make_frame: Frames, papers: dict[str, object], other: dict[str, object]
) -> None:
    lora, hydra = {"method": "lora", "batch_size": 1, **PAPERS}, {"method": "hydra", "batch_size": 4, **PAPERS}
    frame = make_frame(
        {**lora, **papers, "total_s_per_sample": 4.0},
        {**lora, **other, "total_s_per_sample": 8.0},
        {**hydra, **papers, "total_s_per_sample": 1.0},
        {**hydra, **other, "total_s_per_sample": 2.0},
    )
    for rows in (frame, frame.iloc[::-1]):
        cells = table_1(rows).cells.set_index("method")
        assert cells.loc[["LoRA-PPO", "Hydra-PPO"], "s/sample, ours"].tolist() == ["4", "1"]


def test_methods_that_were_measured_under_other_options_are_named(make_frame: Frames) -> None:
    lora, hydra = {"method": "lora", **PAPERS}, {"method": "hydra", **PAPERS}
    left_out = "Measured, but not at the length, options and conditions of LoRA-PPO's case: Hydra-PPO."
    assert left_out in table_1(make_frame(lora, {**hydra, "options": "ppo.num_ppo_epochs=4"})).explanation
    assert "Measured, but" not in table_1(make_frame(lora, hydra, {"method": "full", "outcome": "oom"})).explanation
