from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import pytest

from rlhfreports.profiles import TOP, Profile, flame_rects, function_first, kernels, on_device, shorter, top_ops

Op = tuple[str, str, int, float, float]
Call = tuple[str, int, float]


def profile(
    ops: Sequence[Op] = (), calls: Sequence[Call] = (), found: Sequence[tuple[str, int, float]] = ()
) -> Profile:
    """One phase of ten seconds, two of them in no op. Device seconds of a call are half of its own."""
    phase = {"phase": "update_actor"}
    return {
        "phases": pd.DataFrame(
            [{**phase, "trace": "t.json.gz", "wall_s": 10.0, "outside_s": 2.0, "num_ops": len(ops)}]
        ),
        "ops": pd.DataFrame(
            [(phase["phase"], *op) for op in ops], columns=["phase", "name", "kind", "count", "self_s", "device_s"]
        ),
        "kernels": pd.DataFrame(
            [(phase["phase"], *row) for row in found], columns=["phase", "name", "count", "device_s"]
        ),
        "stacks": pd.DataFrame(
            [(phase["phase"], row, name, "Python", p, s, s / 2, 1) for row, (name, p, s) in enumerate(calls)],
            columns=["phase", "row", "name", "kind", "parent", "total_s", "device_s", "count"],
        ),
        "allocator": pd.DataFrame(columns=["s", "active_bytes", "reserved_bytes"]),
    }


def test_top_ops_of_a_cpu_have_the_time_in_no_op_among_them() -> None:
    found = top_ops(profile([("mm", "torch op", 3, 5.0, 0.0), ("add", "torch op", 1, 1.0, 0.0)]))
    assert found[["phase", "rank", "op", "seconds", "share"]].to_numpy().tolist() == [
        ["update actor", 0, "mm", 5.0, 0.5],
        ["update actor", 1, "Python, in no op", 2.0, 0.2],
        ["update actor", 2, "add", 1.0, 0.1],
    ]


def test_top_ops_of_a_device_have_the_time_of_their_kernels() -> None:
    found = profile(
        [("mm", "torch op", 3, 5.0, 1.0), ("sync", "CUDA call", 1, 4.0, 0.0), ("add", "torch op", 2, 0.1, 3.0)]
    )
    assert on_device(found)
    assert top_ops(found)[["op", "seconds"]].to_numpy().tolist() == [["add", 3.0], ["mm", 1.0]]


def test_there_are_at_most_so_many_ops_and_kernels_a_phase() -> None:
    found = profile(
        [(f"op{i}", "torch op", 1, float(i), 0.0) for i in range(1, 30)],
        found=[(f"kernel{i}", 1, 1.0) for i in range(30)],
    )
    assert len(top_ops(found)) == len(kernels(found)) == TOP
    assert top_ops(found)["op"].tolist()[0] == "op29"
    assert kernels(found).iloc[0].to_dict() == {
        "phase": "update actor",
        "rank": 0,
        "op": "kernel0",
        "kind": "kernel",
        "count": 1,
        "seconds": 1.0,
        "share": 0.1,
    }


def rects(found: Profile) -> list[list[object]]:
    return flame_rects(found)[["name", "depth", "x0", "x1"]].to_numpy().tolist()


def test_a_rectangle_lies_under_its_caller_beside_its_siblings() -> None:
    calls = [("f", -1, 6.0), ("g", 0, 4.0), ("h", 1, 1.0), ("i", 0, 1.0), ("k", -1, 4.0), ("l", 4, 2.0)]
    assert rects(profile(calls=calls)) == [
        ["f", 0, 0.0, 6.0],
        ["g", 1, 0.0, 4.0],
        ["h", 2, 0.0, 1.0],
        ["i", 1, 4.0, 5.0],
        ["k", 0, 6.0, 10.0],
        ["l", 1, 6.0, 8.0],
    ]
    assert flame_rects(profile(calls=calls))["share"].tolist() == [0.6, 0.4, 0.1, 0.1, 0.4, 0.2]


def test_rectangles_too_narrow_to_see_are_left_out_with_what_they_call() -> None:
    assert rects(profile(calls=[("f", -1, 1000.0), ("g", 0, 1.0), ("h", 1, 900.0)])) == [["f", 0, 0.0, 1000.0]]


def test_rectangles_of_a_device_have_the_width_of_their_kernels() -> None:
    found = profile([("mm", "torch op", 1, 1.0, 1.0)], [("f", -1, 6.0), ("g", 0, 4.0)])
    assert rects(found) == [["f", 0, 0.0, 3.0], ["g", 1, 0.0, 2.0]]


def test_an_empty_profile_has_no_rows() -> None:
    empty = profile()
    assert flame_rects(empty).empty
    assert kernels(empty).empty
    assert top_ops(empty)["op"].tolist() == ["Python, in no op"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rlhfkernels/engine/fast/blocks.py(78): forward", "forward · blocks.py:78"),
        ("main.py(1): <module>", "<module> · main.py:1"),
        ("aten::mm", "aten::mm"),
        ("nn.Module: Linear", "nn.Module: Linear"),
    ],
)
def test_a_frame_shows_its_function_first(name: str, expected: str) -> None:
    assert function_first(name) == expected


def test_a_long_name_keeps_both_ends() -> None:
    assert shorter("short") == "short"
    cut = shorter("a" * 100 + "b" * 100)
    assert len(cut) <= 70
    assert (cut[0], cut[-1]) == ("a", "b")
