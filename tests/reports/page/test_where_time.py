from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from rlhfbench.records.profiles import profile_frames
from rlhfreports.page import phases
from rlhfreports.page.blocks import Block, Chart, Links, Table
from rlhfreports.page.data import Page, Run
from rlhfreports.page.render import rendered
from rlhfreports.page.where_time import where_time_section

Frames = Callable[..., pd.DataFrame]
CASE: dict[str, Any] = {
    "case_id": "a",
    "generate_phase_s": 4.0,
    "generate_phase_flops": 400,
    "generate_phase_bytes": 20,
    "generate_phase_floor_s": 1.0,
    "update_actor_phase_s": 2.0,
    "matmul_flops_per_s": 1000.0,
    "copy_bytes_per_s": 10.0,
    "read_bytes_per_s": 20.0,
}


def profile(name: str = "aten::mm", *, cuda: bool = False) -> dict[str, Any]:
    device_s = 1.0 if cuda else 0.0
    phase = {
        "phase": "generate",
        "trace": "a b-generate.json.gz",
        "wall_s": 2.0,
        "num_ops": 3,
        "ops": [{"name": name, "kind": "torch op", "count": 3, "self_s": 0.5, "device_s": device_s}],
        "kernels": [{"name": "gemm", "count": 3, "device_s": 1.0}] if cuda else [],
        "outside_s": 0.25,
        "stacks": {
            "name": ["m/f.py(3): f", name],
            "kind": ["Python", "torch op"],
            "parent": [-1, 0],
            "total_s": [1.0, 0.5],
            "device_s": [device_s, device_s],
            "count": [1, 2],
        },
    }
    curve = {"s": [0.0, 1.0], "active_bytes": [2**30, 2**31], "reserved_bytes": [2**32, 2**32]}
    return {"phases": [phase], "allocator": curve if cuda else None}


def blocks_of(*runs: Run) -> dict[str, Block]:
    section = where_time_section(Page.of(runs))
    assert section is not None
    return {getattr(block, "id", type(block).__name__): block for block in section.blocks}


def fields(node: Any) -> set[str]:
    """Every field and every quantity that a specification encodes."""
    if isinstance(node, dict):
        found = {node["field"]} if isinstance(node.get("field"), str) else set()
        return found.union(*map(fields, node.values()))
    return set().union(*map(fields, node)) if isinstance(node, list) else set()


def switches(chart: Block) -> dict[str, list[str]]:
    assert isinstance(chart, Chart)
    return {p["name"]: p["bind"]["options"] for p in chart.spec["params"] if isinstance(p.get("bind"), dict)}


def titles(node: Any) -> set[str]:
    if isinstance(node, dict):
        found = {node["title"]} if isinstance(node.get("title"), str) and "field" in node else set()
        return found.union(*map(titles, node.values()))
    return set().union(*map(titles, node)) if isinstance(node, list) else set()


def test_a_run_without_times_has_no_section(make_frame: Frames) -> None:
    assert where_time_section(Page.of([Run(name="r", frame=make_frame({"outcome": "oom"}))])) is None
    assert where_time_section(Page.of([Run(name="r", frame=make_frame())])) is None


def test_phases_and_roofline_need_no_profile(make_frame: Frames) -> None:
    frame = make_frame(CASE, {**CASE, "case_id": "b", "method": "lora", "batch_size": 4})
    found = blocks_of(Run(name="r", frame=frame))
    assert list(found) == ["phase-seconds", "roofline"]
    seconds, roofline = found["phase-seconds"], found["roofline"]
    assert isinstance(seconds, Chart)
    assert isinstance(roofline, Chart)
    assert switches(seconds) == {"size": ["64 tokens, batch 4", "64 tokens, batch 1"]}
    assert switches(roofline) == {"size": ["all", "64 tokens, batch 4", "64 tokens, batch 1"]}
    assert {"seconds per sample"} <= titles(seconds.spec)
    assert {"arithmetic intensity (FLOP/byte)", "FLOP/s"} <= titles(roofline.spec)
    assert {"intensity", "flops_per_s", "phase", "title", "floor_fraction"} <= fields(roofline.spec)
    assert set(roofline.data) == {"roofline", "ceilings"}
    for chart in (seconds, roofline):
        held = {name for frame in chart.data.values() for name in frame.columns}
        assert fields(chart.spec) <= held | {"sum_seconds_per_sample", "sum_floor_s_per_sample"}


def test_a_long_run_shows_one_size_at_a_time(make_frame: Frames, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "_MAX_POINTS", 1)
    frame = make_frame(CASE, {**CASE, "batch_size": 4})
    found = switches(blocks_of(Run(name="r", frame=frame))["roofline"])
    assert found == {"size": ["64 tokens, batch 4", "64 tokens, batch 1"]}


def test_a_run_without_work_has_no_roofline(make_frame: Frames) -> None:
    frame = make_frame({"case_id": "a", "generate_phase_s": 4.0})
    assert list(blocks_of(Run(name="r", frame=frame))) == ["phase-seconds"]


def test_two_machines_have_a_switch(make_frame: Frames) -> None:
    runs = [Run(name=name, frame=make_frame({**CASE, "device": name})) for name in ("cpu", "cuda")]
    assert switches(blocks_of(*runs)["roofline"])["machine"] == ["cpu · cpu", "cuda · cuda"]


def test_a_profile_of_a_cpu_has_ops_flame_table_and_links(make_frame: Frames) -> None:
    run = Run(name="r", frame=make_frame(CASE), profiles={"a": profile_frames(profile())})
    found = blocks_of(run)
    assert list(found) == ["phase-seconds", "roofline", "Text", "top-ops", "flame", "top-ops-table", "Links"]
    ops, flame, table, links = (found[name] for name in ("top-ops", "flame", "top-ops-table", "Links"))
    assert isinstance(ops, Chart)
    assert ops.data["top-ops"]["op"].tolist() == ["aten::mm", "Python, in no op"]
    assert switches(ops) == {"profiled": ["Hydra-PPO, 64 tokens, batch 1"], "phase": ["generate"]}
    assert isinstance(flame, Chart)
    assert flame.data["flame"]["label"].tolist() == ["f · f.py:3", "aten::mm"]
    assert fields(flame.spec) <= {*flame.data["flame"].columns, "below", "middle"}
    assert isinstance(table, Table)
    assert [cell.text for cell in table.rows[0]] == [
        "Hydra-PPO, 64 tokens, batch 1",
        "generate",
        "aten::mm",
        "torch op",
        "3",
        "0.5",
        "25.0",
    ]
    assert table.rows[1][4].order is None
    assert isinstance(links, Links)
    assert [link.url for link in links.links] == ["traces/a/a%20b-generate.json.gz"]


def test_a_profile_of_a_gpu_has_kernels_and_the_allocator(make_frame: Frames) -> None:
    run = Run(name="r", frame=make_frame(CASE), profiles={"a": profile_frames(profile(cuda=True))})
    found = blocks_of(run)
    assert {"top-kernels", "allocator"} <= set(found)
    kernels, allocator, links = found["top-kernels"], found["allocator"], found["Links"]
    assert isinstance(kernels, Chart)
    assert kernels.data["top-kernels"]["op"].tolist() == ["gemm"]
    assert isinstance(allocator, Chart)
    assert allocator.data["allocator"].groupby("what")["gib"].max().to_dict() == {"active": 2.0, "reserved": 4.0}
    assert isinstance(links, Links)
    assert links.links[-1].url == "traces/a/snapshot.pickle"


@pytest.mark.parametrize(("phase", "says"), [("generate", False), ("update_actor", True)])
def test_a_chart_that_may_be_empty_says_so(make_frame: Frames, phase: str, says: bool) -> None:
    other = profile(cuda=True)
    other["phases"][0]["phase"] = phase
    profiles = {"a": profile_frames(profile(cuda=True)), "b": profile_frames(other)}
    frame = make_frame(CASE, {**CASE, "case_id": "b", "batch_size": 2})
    found = blocks_of(Run(name="r", frame=frame, profiles=profiles))
    for name in ("top-ops", "top-kernels", "flame"):
        chart = found[name]
        assert isinstance(chart, Chart)
        assert chart.caption.endswith(" The chart is empty where the chosen case has no such phase.") is says


def test_a_comparison_names_the_run_of_a_profile_and_links_nowhere(make_frame: Frames) -> None:
    runs = [
        Run(name=name, frame=make_frame(CASE), profiles={"a": profile_frames(profile())})
        for name in ("before", "after")
    ]
    found = blocks_of(*runs)
    assert "Links" not in found
    assert switches(found["flame"])["profiled"] == [
        "Hydra-PPO, before, 64 tokens, batch 1",
        "Hydra-PPO, after, 64 tokens, batch 1",
    ]


@pytest.mark.parametrize("cuda", [False, True])
def test_hostile_names_are_escaped(make_frame: Frames, cuda: bool) -> None:
    hostile = "</script><script>alert(1)</script>"
    frame = make_frame({**CASE, "method_title": hostile})
    run = Run(name=hostile, frame=frame, profiles={"a": profile_frames(profile(hostile, cuda=cuda))})
    section = where_time_section(Page.of([run]))
    assert section is not None
    assert "<script>alert" not in rendered("r", "", [section])
