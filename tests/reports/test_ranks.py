"""The frames of cases over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from rlhfreports.ranks import (
    AT_WORK,
    MEMORY,
    TIME,
    WAITING,
    has_ranks,
    planned_cases,
    planned_lines,
    rank_bars,
    scaling_points,
    strategy_bars,
    unmeasured,
)

GIB = 2**30
Make = Callable[..., pd.DataFrame]
Ranked = Callable[..., dict[str, Any]]
STAGE_3 = {"parallel": "deepspeed", "zero_stage": 3}


def test_lines_of_weak_and_of_strong_scaling(make_frame: Make, ranked: Ranked) -> None:
    frame = make_frame(ranked(1, 4, 1.0), ranked(2, 4, 0.5), ranked(2, 2, 0.625), ranked(4, 1, 0.5))
    points = scaling_points(frame)
    # The point of two ranks with batch 2 has no partner of the same batch; over all ranks it has three.
    assert points["at"].tolist() == ["weak: 64 tokens, batch 4"] * 2 + ["strong: 64 tokens, batch 4"] * 3
    assert points["world_size"].tolist() == [1, 2, 1, 2, 4]
    assert points["speed_up"].tolist() == pytest.approx([1.0, 2.0, 1.0, 1.6, 2.0])
    assert points["efficiency"].tolist() == pytest.approx([1.0, 1.0, 1.0, 0.8, 0.5])


@pytest.mark.parametrize(
    "other",
    [
        {"parallel": "fsdp"},
        {"parallel": "deepspeed", "zero_stage": 1},
        {"others": "parallel.gather=rollout"},
        {"others": "ppo.num_ppo_epochs=2"},
        {"prompt_len": 16},
        {"prompt_len": 16, "completion_len": 48},
        {"method": "lora"},
        {"dtype": "bfloat16"},
        {"host": "another"},
        {"outcome": "oom", "total_s_per_sample": None},
    ],
)
def test_cases_that_differ_in_more_than_their_ranks_make_no_line(
    make_frame: Make, ranked: Ranked, other: dict[str, Any]
) -> None:
    assert len(scaling_points(make_frame(ranked(1, 4, 1.0), ranked(2, 4, 0.5)))) == 2
    found = scaling_points(make_frame(ranked(1, 4, 1.0, host="one"), ranked(2, 4, 0.5, **{"host": "one", **other})))
    assert found.empty


def test_a_run_without_ranks_has_none(make_frame: Make) -> None:
    frame = make_frame({}, {"batch_size": 2})
    assert not has_ranks(frame)
    assert not has_ranks(frame.drop(columns="parallel"))
    for found in (scaling_points(frame), strategy_bars(frame), unmeasured(frame), rank_bars(frame, pd.DataFrame())):
        assert found.empty


def test_strategies_stand_beside_each_other_in_one_order(make_frame: Make, ranked: Ranked) -> None:
    frame = make_frame(
        ranked(2, 4, 2.0, parallel="fsdp", others="parallel.gather=rollout"),
        ranked(2, 4, 2.0, **STAGE_3, waiting_share=None),
        ranked(2, 4, 1.0),
        ranked(1, 4, 1.0),
        {"outcome": "ok"},
    )
    bars = strategy_bars(frame)
    at = "2 ranks, 64 tokens, batch 4"
    assert list(dict.fromkeys(bars["at"])) == [at, "1 rank, 64 tokens, batch 4"]
    assert list(dict.fromkeys(bars.loc[bars["at"] == at, "label"])) == ["DDP", "ZeRO-3", "FSDP, gathered by rollout"]
    ddp = bars[(bars["at"] == at) & (bars["label"] == "DDP")]
    assert ddp[["what", "part", "value"]].to_numpy().tolist() == [
        [MEMORY, "base", 1.0],
        [MEMORY, "activations", 0.5],
        [TIME, AT_WORK, 0.75],
        [TIME, WAITING, 0.25],
    ]
    assert list(dict.fromkeys(ddp["words"])) == ["1.50 GiB, 1 s", "1 s, 25 % waiting"]
    zero = bars[(bars["label"] == "ZeRO-3") & (bars["what"] == TIME)]
    assert zero[["part", "value", "words"]].to_numpy().tolist() == [[AT_WORK, 2.0, "2 s"]]


def test_a_strategy_that_failed_has_its_outcome(make_frame: Make, ranked: Ranked) -> None:
    frame = make_frame(ranked(2, 4, 1.0), ranked(2, 4, 1.0, **STAGE_3, outcome="oom", error="no memory."))
    assert unmeasured(frame).to_dict("records") == [
        {
            "title": "Hydra-PPO",
            "label": "ZeRO-3",
            "at": "2 ranks, 64 tokens, batch 4",
            "word": "OOM",
            "error": "no memory.",
        }
    ]


def test_bars_are_in_the_words_of_the_cases_that_failed_too(make_frame: Make, ranked: Ranked) -> None:
    failed: dict[str, Any] = {"outcome": "oom", "total_s_per_sample": None}
    frame = make_frame(
        ranked(2, 4, 1.0), ranked(2, 4, 1.0, **STAGE_3, **failed), ranked(2, 4, 1.0, model="b", **failed)
    )
    assert set(strategy_bars(frame)["at"]) == {"2 ranks, 64 tokens, batch 4, tiny"}
    marks = unmeasured(frame)
    assert dict(zip(marks["label"], marks["at"], strict=True)) == {
        "DDP": "2 ranks, 64 tokens, batch 4, b",
        "ZeRO-3": "2 ranks, 64 tokens, batch 4, tiny",
    }


def test_plans_stand_beside_the_cases_that_ran(make_frame: Make, ranked: Ranked) -> None:
    frame = make_frame(
        ranked(1, 4, 1.0, predicted_total_bytes=3 * GIB),
        ranked(2, 4, 0.5),
        ranked(4, 4, 0.5, outcome="oom", total_s_per_sample=None),
        ranked(2, 4, 0.5, method="lora"),  # nobody planned it
    )
    plans = make_frame(
        *(ranked(size, 4, 1.0, outcome=None, total_s_per_sample=None, total_bytes=5 * GIB) for size in (2, 4, 8))
    )
    cases = planned_cases(frame, plans)
    assert cases["world_size"].tolist() == [1, 2, 4, 8]
    assert [size / GIB for size in cases["planned_bytes"]] == [3, 5, 5, 5]
    assert cases["measured_bytes"].isna().tolist() == [False, False, True, True]
    assert cases["error_percent"].tolist()[:2] == pytest.approx([100, 100 * (5 / 1.5 - 1)], rel=1e-4)
    lines = planned_lines(cases)
    assert lines["at"].tolist() == ["weak: 64 tokens, batch 4"] * 4
    assert planned_lines(cases[:1]).empty
    alone = planned_cases(frame, pd.DataFrame())
    assert alone["world_size"].tolist() == [1]
    assert planned_cases(make_frame({}), pd.DataFrame()).empty


def test_a_plan_finds_its_measurement_whichever_machine_made_it(make_frame: Make, ranked: Ranked) -> None:
    frame = make_frame(ranked(1, 4, 1.0, host="one"), ranked(2, 4, 0.5, host="two"))
    plans = make_frame(
        *(ranked(size, 4, 1.0, outcome=None, total_s_per_sample=None, total_bytes=3 * GIB) for size in (1, 2))
    )
    cases = planned_cases(frame, plans)
    assert cases["world_size"].tolist() == [1, 2]
    assert cases["measured_bytes"].notna().all()
    assert planned_lines(cases)["at"].tolist() == ["weak: 64 tokens, batch 4"] * 2


def test_a_plan_finds_its_measurement_whatever_the_seed_of_either(make_frame: Make, ranked: Ranked) -> None:
    frame = make_frame(ranked(2, 4, 0.5, seed=3))
    plans = make_frame(ranked(2, 4, 1.0, outcome=None, total_s_per_sample=None, total_bytes=3 * GIB))
    cases = planned_cases(frame, plans)
    assert cases[["planned_bytes", "measured_bytes"]].notna().to_numpy().tolist() == [[True, True]]


def of_ranks(case_id: str, *waited: float | None, hosts: tuple[str, str] = ("one", "one")) -> pd.DataFrame:
    rows = [
        {"case_id": case_id, "rank": i, "host": hosts[i], "device": "cpu", "total_bytes": GIB, "base_part_bytes": GIB}
        | {"communication_step_s": 2.0, "waiting_s": seconds}
        for i, seconds in enumerate(waited)
    ]
    return pd.DataFrame(rows)


def test_the_ranks_of_the_largest_case_of_each_line(make_frame: Make, ranked: Ranked) -> None:
    frame = make_frame(
        ranked(2, 4, 1.0, case_id="small"),
        ranked(2, 4, 1.0, case_id="large", prompt_len=64),
        ranked(2, 4, 1.0, case_id="none", **STAGE_3),
    )
    ranks = pd.concat([of_ranks("small", 0.0, 1.0), of_ranks("large", 0.5, None, hosts=("one", "two"))])
    bars = rank_bars(frame, ranks)
    assert set(bars["at"]) == {"Hydra-PPO, DDP, 2 ranks, 128 tokens, batch 4"}
    assert bars[["label", "part", "value", "words"]].to_numpy().tolist() == [
        ["rank 0, cpu on one", "base", 1.0, "1.00 GiB"],
        ["rank 1, cpu on two", "base", 1.0, "1.00 GiB"],
        ["rank 0, cpu on one", AT_WORK, 1.5, "2 s, 25 % waiting"],
        ["rank 1, cpu on two", AT_WORK, 2.0, "2 s"],
        ["rank 0, cpu on one", WAITING, 0.5, "2 s, 25 % waiting"],
    ]
