from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from rlhfreports import frames

Frames = Callable[..., pd.DataFrame]
GIB = 2**30


def test_times_have_a_row_per_case_and_kind_with_the_ends_of_the_interval(make_frame: Frames) -> None:
    found = frames.times(
        make_frame(
            {"total_s_per_sample": 2.0, "total_half_width_s_per_sample": 0.5},
            {"outcome": "oom", "prompt_len": 64},
        )
    )
    assert found["kind"].tolist() == ["total", "inference", "update"]
    total = found.iloc[0]
    assert (total["seconds"], total["low"], total["high"], total["tokens"]) == (2.0, 1.5, 2.5, 64.0)
    assert (found["low"][1], found["high"][1]) == (0.75, 0.75)
    assert set(found["panel"]) == {"batch 1"}
    assert set(found["line"]) == {"Hydra-PPO"}


def test_the_panel_of_the_largest_batch_shows_the_batch_of_each_point(make_frame: Frames) -> None:
    frame = make_frame({}, {"batch_size": 2}, {"method": "lora"}, {"method": "lora", "batch_size": 2, "outcome": "oom"})
    titles = frames.panel_titles(frame)
    assert titles == ["batch 1", "batch 2", "largest batch that fits"]
    found = frames.times(frame)
    assert set(found.loc[found["shows_batch"].astype(bool), "panel"]) == {titles[-1]}
    assert set(found["panel"]) == set(titles)
    assert set(frames.failures(frame)["panel"]) <= set(titles)


def test_an_interval_that_reaches_zero_ends_at_a_tenth(make_frame: Frames) -> None:
    found = frames.times(make_frame({"total_s_per_sample": 1.0, "total_half_width_s_per_sample": 3.0}))
    assert found["low"][0] == pytest.approx(0.1)


def test_tokens_count_every_sequence_of_a_sample(make_frame: Frames) -> None:
    found = frames.times(make_frame({"method": "dpo", "sequences_per_sample": 2, "prompt_len": 10}))
    assert set(found["tokens"]) == {40.0}


def test_a_kind_that_a_method_has_not_is_left_out(
    make_frame: Frames, other_shapes: tuple[dict[str, object], ...]
) -> None:
    found = frames.times(make_frame(*other_shapes))
    assert set(zip(found["method"], found["kind"], strict=True)) == {
        *(("sft", kind) for kind in ("total", "update")),
        *(("dpo", kind) for kind in ("total", "inference", "update")),
        *(("best-of-n", kind) for kind in ("total", "inference")),
    }


def test_failures_keep_outcome_and_error(make_frame: Frames) -> None:
    found = frames.failures(make_frame({}, {"prompt_len": 64, "outcome": "oom", "error": "no memory."}))
    assert found[["outcome", "error", "seq_len"]].to_dict("records") == [
        {"outcome": "oom", "error": "no memory.", "seq_len": 128}
    ]


def test_slopes_equal_an_independent_fit_and_need_two_lengths(make_frame: Frames) -> None:
    seconds = {16: 0.1, 32: 0.25, 64: 0.4}
    frame = make_frame(*({"prompt_len": p, "total_s_per_sample": s} for p, s in seconds.items()))
    found = frames.slopes(frame).set_index("kind")["slope"]
    x, y = np.log([32, 64, 128]), np.log(list(seconds.values()))
    expected = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert found["total"] == pytest.approx(expected)
    assert found["update"] == pytest.approx(0.0, abs=1e-12)
    assert frames.slopes(make_frame({})).empty


def test_parts_sum_to_the_total_and_leave_out_what_is_not_there(make_frame: Frames) -> None:
    frame = make_frame({"base_part_bytes": GIB, "activations_part_bytes": GIB // 2, "kv_cache_part_bytes": 0})
    found = frames.parts(frame)
    assert found[["part", "gib"]].to_dict("list") == {"part": ["base", "activations"], "gib": [1.0, 0.5]}
    assert set(found["size"]) == {"64 tokens, batch 1"}
    assert found["place"].is_monotonic_increasing


def test_sizes_of_parts_are_in_the_words_of_the_cases_that_failed_too(make_frame: Frames) -> None:
    frame = make_frame({"base_part_bytes": GIB}, {"model": "llama-7b", "outcome": "oom"})
    assert frames.parts(frame)["size"].tolist() == ["64 tokens, batch 1, tiny"]


def test_of_two_records_of_a_case_the_newer_is_the_bar(make_frame: Frames) -> None:
    frame = make_frame({"base_part_bytes": GIB}, {"base_part_bytes": 2 * GIB}, {"outcome": "oom"})
    assert frames.parts(frame)["gib"].tolist() == [2.0]


def test_sizes_name_the_split_where_one_length_has_two_and_every_axis_that_varies(make_frame: Frames) -> None:
    frame = make_frame(
        {"prompt_len": 8, "completion_len": 24, "dtype": "float32"},
        {"prompt_len": 24, "completion_len": 8, "dtype": "bfloat16"},
    )
    assert frames.size_of(frame).tolist() == ["8+24 tokens, batch 1, float32", "24+8 tokens, batch 1, bfloat16"]


def test_memory_has_a_row_for_every_kind_that_was_counted(make_frame: Frames) -> None:
    found = frames.memory(make_frame({"model_bytes": 2 * GIB}, {"prompt_len": 64, "outcome": "oom"}))
    assert found["what"].tolist() == ["total", "model", "activation"]
    assert found["gib"].tolist() == pytest.approx([2.5, 2.0, 0.5], rel=1e-5)


def test_swept_numbers_need_two_values_at_one_size(make_frame: Frames) -> None:
    frame = make_frame(
        {"lora_rank": 8, "options": "ppo.num_ppo_epochs=1"},
        {"lora_rank": 16, "options": "ppo.num_ppo_epochs=1"},
        {"lora_rank": 16, "options": "ppo.num_ppo_epochs=4, lora.target_modules=all"},
        {"lora_rank": 16, "options": "ppo.num_ppo_epochs=2, lora.target_modules=all"},
        {"lora_rank": 32, "prompt_len": 64},
    )
    found = frames.swept(frame)
    assert list(dict.fromkeys(found["axis"])) == ["LoRA rank", "ppo.num_ppo_epochs"]
    ranks, epochs = (found[found["axis"] == axis] for axis in ("LoRA rank", "ppo.num_ppo_epochs"))
    assert ranks["value"].tolist() == [8, 16]
    assert set(ranks["size"]) == {"64 tokens, batch 1, ppo.num_ppo_epochs=1"}
    assert epochs["value"].tolist() == [2, 4]
    assert set(epochs["size"]) == {"64 tokens, batch 1, LoRA rank 16, lora.target_modules=all"}
    assert frames.swept(make_frame({})).empty


def test_a_number_that_follows_from_the_setting_is_not_swept(make_frame: Frames) -> None:
    frame = make_frame({"lora_rank": 16, "setting": "modern"}, {"lora_rank": 128, "setting": "paper"})
    assert frames.swept(frame).empty


def test_predictions_stand_beside_measurements(make_frame: Frames) -> None:
    frame = make_frame(
        {
            "predicted_model_bytes": GIB,
            "predicted_activation_bytes": GIB,
            "predicted_total_bytes": 3 * GIB,
        }
    )
    found = frames.predicted(frame).set_index("kind")
    assert found.loc["activation", "percent"] == pytest.approx(100.0)
    assert found.loc["total", "predicted_gib"] == 3.0
    assert frames.predicted(make_frame({})).empty


def blocks(*rows: dict[str, object]) -> pd.DataFrame:
    names = ("case_id", "block", "started_at", "total_s_per_sample", "other_cpu_share", "steal_share", "cpu_mhz")
    return pd.DataFrame([{**dict.fromkeys((*names, "disturbed_by")), **row} for row in rows]).convert_dtypes()


def test_blocks_lie_on_the_wall_time_against_the_median_of_their_case(make_frame: Frames) -> None:
    frame = make_frame({"case_id": "a"}, {"case_id": "b", "prompt_len": 64})
    found = frames.block_times(
        frame,
        blocks(
            {"case_id": "a", "block": 0, "started_at": "2026-01-01T00:00:00Z", "total_s_per_sample": 1.0},
            {"case_id": "b", "block": 0, "started_at": "2026-01-01T00:01:30+00:00", "total_s_per_sample": 9.0},
            {"case_id": "a", "block": 1, "started_at": "2026-01-01T00:03:00Z", "total_s_per_sample": 3.0},
            {"case_id": "a", "block": 2, "started_at": "broken", "total_s_per_sample": 2.0, "other_cpu_share": 0.25},
            {"case_id": "a", "block": 3, "started_at": "2026-01-01T00:04:00Z"},
        ),
    )
    assert found["minutes"].tolist()[:3] == [0.0, 1.5, 3.0]
    assert math.isnan(found["minutes"][3])
    assert found["percent"].tolist() == pytest.approx([-50.0, 0.0, 50.0, 0.0])
    assert found["others"][3] == 25.0
    assert found["size"][1] == "128 tokens, batch 1"


def drifting(num_cases: int, num_blocks: int, slope: float) -> pd.DataFrame:
    """Blocks in rounds, one a minute; each case has a level of its own, and noise that sums to 0."""
    rows = [
        {
            "line": f"case {case}",
            "size": "",
            "minutes": float(block * num_cases + case),
            "percent": 10.0 * case + slope * (block * num_cases + case) + 0.25 * (-1) ** (block + case),
        }
        for block in range(num_blocks)
        for case in range(num_cases)
    ]
    return pd.DataFrame(rows)


def test_drift_equals_a_regression_with_a_level_for_each_case(make_frame: Frames) -> None:
    """The reference is a least-squares fit with a column for each case."""
    blocks = drifting(3, 4, 0.5)
    levels = pd.get_dummies(blocks["line"]).to_numpy(dtype=float)
    design = np.column_stack([blocks["minutes"], levels])
    y = blocks["percent"].to_numpy()
    fitted, (residual,), *_ = np.linalg.lstsq(design, y, rcond=None)
    degrees = len(y) - design.shape[1]
    error = math.sqrt(residual / degrees * np.linalg.inv(design.T @ design)[0, 0])
    found = frames.drift(blocks)
    assert found == pytest.approx((11 * fitted[0], 11 * float(stats.t.ppf(0.975, degrees)) * error))
    assert found is not None
    assert found[0] == pytest.approx(5.5, abs=1)


@pytest.mark.parametrize("num_blocks", [0, 1])
def test_one_block_a_case_tells_no_drift(num_blocks: int) -> None:
    empty = pd.DataFrame(columns=["line", "size", "minutes", "percent"])
    assert frames.drift(drifting(3, 1, 1.0) if num_blocks else empty) is None


def test_runs_and_settings_are_part_of_a_line(make_frame: Frames) -> None:
    frame = make_frame({"setting": "modern"}, {"setting": "paper"}).assign(run=pd.array(["a", "a"], dtype="string"))
    assert frames.line_of(frame).tolist() == ["Hydra-PPO, modern", "Hydra-PPO, paper"]
    two = make_frame({}, {}).assign(run=pd.array(["a", "b"], dtype="string"))
    assert frames.line_of(two).tolist() == ["Hydra-PPO, a", "Hydra-PPO, b"]


@pytest.mark.parametrize(
    "make", [frames.times, frames.failures, frames.slopes, frames.parts, frames.memory, frames.swept]
)
def test_an_empty_frame_gives_an_empty_frame_with_columns(
    make_frame: Frames, make: Callable[..., pd.DataFrame]
) -> None:
    found = make(make_frame())
    assert found.empty
    assert "line" in found
