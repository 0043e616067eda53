from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from rlhfreports.phases import ceilings, machine_of, phase_points, phases_of, roofline_points

Frames = Callable[..., pd.DataFrame]
RATES = {"matmul_flops_per_s": 1000.0, "copy_bytes_per_s": 10.0, "read_bytes_per_s": 20.0}


def row(**fields: Any) -> dict[str, Any]:
    return {
        "batch_size": 2,
        "generate_phase_s": 4.0,
        "generate_phase_flops": 400,
        "generate_phase_bytes": 20,
        "generate_phase_floor_s": 1.0,
        "update_actor_phase_s": 2.0,
        **RATES,
        **fields,
    }


def test_a_phase_has_its_time_its_work_and_its_share_of_the_roofline(make_frame: Frames) -> None:
    points = phase_points(make_frame(row()))
    assert points["phase"].tolist() == ["generate", "update actor"]
    first = points.iloc[0]
    assert (first["seconds"], first["seconds_per_sample"], first["floor_s_per_sample"]) == (4.0, 2.0, 0.5)
    assert (first["floor_fraction"], first["intensity"], first["flops_per_s"]) == (0.25, 20.0, 100.0)
    assert points.iloc[1][["floor_fraction", "intensity", "flops_per_s"]].isna().all()
    assert points["line"].tolist() == ["Hydra-PPO"] * 2


def test_a_sample_of_ranks_takes_its_share_of_the_step_of_all_of_them(make_frame: Frames) -> None:
    first = phase_points(make_frame(row(world_size=4))).iloc[0]
    assert (first["seconds"], first["seconds_per_sample"], first["floor_s_per_sample"]) == (4.0, 0.5, 0.125)


def test_cases_without_a_time_and_phases_that_a_method_lacks_have_no_point(make_frame: Frames) -> None:
    frame = make_frame(row(outcome="oom"), row(method="sft", generate_phase_s=None))
    assert phase_points(frame)[["method", "phase"]].to_numpy().tolist() == [["sft", "update actor"]]


def test_of_two_records_of_a_case_the_newer_has_the_points(make_frame: Frames) -> None:
    points = phase_points(make_frame(row(), row(generate_phase_s=8.0), row(outcome="oom")))
    assert points["seconds"].tolist() == [8.0, 2.0]


def test_the_roofline_has_the_phases_that_logarithmic_axes_can_show(make_frame: Frames) -> None:
    points = roofline_points(
        make_frame(row(), row(seed=1, generate_phase_flops=0), row(seed=2, generate_phase_bytes=0))
    )
    assert points["phase"].tolist() == ["generate"]


@pytest.mark.parametrize("rows", [[], [{"outcome": "oom"}], [{}]])
def test_frames_without_phases_give_no_points(make_frame: Frames, rows: list[dict[str, Any]]) -> None:
    frame = make_frame(*rows)
    assert phases_of(frame) == []
    assert phase_points(frame).empty
    assert roofline_points(frame).empty
    assert ceilings(frame, roofline_points(frame)).empty


def test_ceilings_meet_at_the_ridge_and_reach_past_every_point(make_frame: Frames) -> None:
    frame = make_frame(row(), row(seed=1, matmul_flops_per_s=2000.0))
    lines = ceilings(frame, roofline_points(frame))
    ends = {name: of[["intensity", "flops_per_s"]].to_numpy().tolist() for name, of in lines.groupby("ceiling")}
    # The highest rate of any case; ridges at 2000 / 10 and 2000 / 20; the only point is at an intensity of 20.
    assert ends == {
        "matmul": [[100.0, 2000.0], [400.0, 2000.0]],
        "read": [[10.0, 200.0], [100.0, 2000.0]],
        "copy": [[10.0, 100.0], [200.0, 2000.0]],
    }
    assert lines["rate"].drop_duplicates().tolist() == [
        "matmul 2e-06 GFLOP/s",
        "read 2e-08 GB/s",
        "copy 1e-08 GB/s",
    ]


def test_each_machine_has_its_own_ceilings(make_frame: Frames) -> None:
    frame = make_frame(
        row(), row(device="cuda", matmul_flops_per_s=9000.0), row(device="cuda:1", read_bytes_per_s=None)
    )
    lines = ceilings(frame, roofline_points(frame))
    assert lines.groupby("machine")["flops_per_s"].max().to_dict() == {"cpu": 1000.0, "cuda": 9000.0}


def test_a_machine_is_named_by_what_varies(make_frame: Frames) -> None:
    assert machine_of(make_frame({}, {"seed": 1})).tolist() == ["cpu", "cpu"]
    frame = make_frame({"host": "a", "num_threads": 2}, {"host": "b", "num_threads": None, "dtype": "bfloat16"})
    assert machine_of(frame).tolist() == ["a · float32 · 2 threads", "b · bfloat16"]
