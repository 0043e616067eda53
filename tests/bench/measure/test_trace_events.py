from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rlhfbench.measure import trace_events
from rlhfbench.measure.trace_events import num_ops, ops_table, read_trace, stack_tree


def event(name: str, start_us: float, end_us: float, cat: str = "cpu_op", tid: int = 1, **args: Any) -> dict[str, Any]:
    ts, dur = start_us, end_us - start_us
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": args}


def python(name: str, start_us: float, end_us: float) -> dict[str, Any]:
    return event(name, start_us, end_us, "python_function")


def by_name(rows: list[dict[str, Any]]) -> dict[str, tuple[float, ...]]:
    return {row["name"]: (row["count"], row["self_s"] * 1e6, row["device_s"] * 1e6) for row in rows}


CUDA = [
    event("aten::linear", 0, 100),
    event("aten::mm", 10, 40),
    event("cudaLaunchKernel", 20, 30, "cuda_runtime", correlation=7),
    event("cudaLaunchKernel", 60, 65, "cuda_runtime", correlation=8),
    event("cudaDeviceSynchronize", 110, 150, "cuda_runtime", correlation=9),
    event("gemm", 200, 260, "kernel", tid=77, correlation=7),
    event("Memcpy", 260, 265, "gpu_memcpy", tid=77, correlation=8),
]


def test_an_op_has_its_own_time_without_that_of_the_ops_it_calls() -> None:
    events = [event("a", 0, 100), event("b", 10, 30), event("c", 15, 25), event("b", 50, 60), {"ph": "M", "name": "x"}]
    table = ops_table(events, 150e-6)
    assert by_name(table["ops"]) == {"a": (1, 70, 0), "b": (2, 20, 0), "c": (1, 10, 0)}
    assert [row["name"] for row in table["ops"]] == ["a", "b", "c"]  # the largest first
    assert table["outside_s"] == pytest.approx(50e-6)
    assert num_ops(events) == 4


def test_a_child_that_ends_a_little_late_ends_with_its_parent() -> None:
    table = ops_table([event("a", 0, 100), event("b", 90, 100.4), event("c", 100.2, 110)], 110e-6)
    assert by_name(table["ops"]) == {"a": (1, 90, 0), "b": (1, 10, 0), "c": (1, pytest.approx(9.8), 0)}


def test_threads_do_not_nest() -> None:
    table = ops_table([event("a", 0, 100), event("b", 10, 30, tid=2)], 100e-6)
    assert by_name(table["ops"]) == {"a": (1, 100, 0), "b": (1, 20, 0)}
    assert table["outside_s"] == 0.0


def test_a_kernel_counts_to_the_op_that_launched_it() -> None:
    table = ops_table(CUDA, 1e-3)
    assert by_name(table["ops"]) == {
        "aten::linear": (1, 65, 5),
        "aten::mm": (1, 20, 60),
        "cudaLaunchKernel": (2, 15, 0),
        "cudaDeviceSynchronize": (1, 40, 0),
    }
    assert {row["name"]: row["kind"] for row in table["ops"]}["cudaDeviceSynchronize"] == "CUDA call"
    assert table["kernels"] == [
        {"name": "gemm", "count": 1, "device_s": pytest.approx(60e-6)},
        {"name": "Memcpy", "count": 1, "device_s": pytest.approx(5e-6)},
    ]


def test_ops_in_c_are_a_kind_of_their_own() -> None:
    (row,) = ops_table([event("native::matmul", 0, 10, "user_annotation")], 1e-5)["ops"]
    assert (row["name"], row["kind"]) == ("matmul", "native op")


def calls(tree: dict[str, list[Any]]) -> list[tuple[Any, ...]]:
    microseconds = [round(1e6 * s, 3) for s in tree["total_s"]]
    return list(zip(tree["name"], tree["parent"], microseconds, tree["count"], strict=True))


def test_equal_calls_from_equal_stacks_are_one_node() -> None:
    events = [
        python("f.py(1): f", 0, 100),
        python("g.py(1): g", 0, 40),
        event("aten::mm", 10, 30),
        python("g.py(1): g", 50, 70),
        event("aten::mm", 55, 60),
        event("aten::mm", 80, 90),
    ]
    assert calls(stack_tree(events)) == [
        ("f.py(1): f", -1, 100, 1),
        ("g.py(1): g", 0, 60, 2),
        ("aten::mm", 1, 25, 2),
        ("aten::mm", 0, 10, 1),
    ]


def test_wrappers_give_their_place_to_what_they_call_and_the_instrument_is_left_out() -> None:
    events = [
        python("f.py(1): f", 0, 100),
        python("rlhfkernels/observer.py(45): phase", 0, 20),
        python("rlhfbench/measure/profile.py(9): enter_phase", 1, 19),
        event("aten::empty", 2, 18),
        python("torch/utils/_contextlib.py(120): decorate_context", 30, 60),
        python("<built-in method run_backward of object at 0x7f>", 31, 59),
        event("autograd::engine::evaluate_function: MmBackward0", 32, 58),
        event("MmBackward0", 33, 57),
        python("g.py(2): g", 70, 90),
    ]
    assert calls(stack_tree(events)) == [
        ("f.py(1): f", -1, 80, 1),
        ("MmBackward0", 0, 24, 1),
        ("g.py(2): g", 0, 20, 1),
    ]


def test_an_op_that_begins_in_a_frame_of_the_profiler_outlasts_it() -> None:
    events = [
        python("launch.py(1): launch", 0, 100),
        python("torch/autograd/profiler.py(7): __enter__", 5, 10),
        python("torch/_ops.py(3): __call__", 6, 9),
        event("native::matmul", 8, 90, "user_annotation"),
    ]
    assert ("matmul", 0, 82, 1) in calls(stack_tree(events))


def test_outer_frames_with_one_child_are_cut_and_modules_lose_their_number() -> None:
    events = [
        python("main.py(1): main", 0, 100),
        python("step.py(1): run", 1, 100),
        python("nn.Module: Linear_3", 2, 60),
        python("nn.Module: Linear_12", 60, 99),
    ]
    assert calls(stack_tree(events)) == [("nn.Module: Linear", -1, 97, 2)]


def test_kernels_count_to_every_caller() -> None:
    tree = stack_tree([python("f.py(1): f", 0, 160), *CUDA])
    device_us = {name: round(1e6 * s, 3) for name, s in zip(tree["name"], tree["device_s"], strict=True)}
    assert (device_us["f.py(1): f"], device_us["aten::linear"], device_us["aten::mm"]) == (65, 65, 60)


def test_the_smallest_calls_are_left_out_until_the_rest_is_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_events, "MAX_NODES", 5)
    events = [python("f.py(1): f", 0, 1000)] + [event(f"op{i}", 40 * i, 41 * i) for i in range(1, 21)]
    names = stack_tree(events)["name"]
    assert 1 < len(names) <= 5
    assert names[1:] == [f"op{i}" for i in range(21 - len(names) + 1, 21)]  # the largest, in their order


def test_a_trace_without_ops_gives_no_rows() -> None:
    assert ops_table([], 1.0) == {"ops": [], "kernels": [], "outside_s": 1.0}
    assert all(column == [] for column in stack_tree([]).values())


def test_a_compressed_trace_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": CUDA}).encode()))
    assert read_trace(path) == CUDA
