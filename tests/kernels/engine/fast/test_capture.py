"""Captures as CUDA graphs, with stand-ins for the functions of CUDA: the order of the calls, and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhfkernels import Observer
from rlhfkernels.engine.fast.capture import CudaGraphs, graph_pool, make_capture, run_eagerly, side_stream
from rlhfkernels.engine.fast.decoding import takes_graphs
from rlhfkernels.ops import fast_paths

CPU = torch.device("cpu")
# What a failed capture leaves to torch's allocator and its generator.
FORGOTTEN = ["end of pool", "generator in a state of its own"]


class Tags(Observer):
    def __init__(self) -> None:
        self.sizes: list[tuple[str, int]] = []

    def tag(self, part: str, tensors: Iterable[torch.Tensor]) -> None:
        self.sizes += [(part, tensor.untyped_storage().nbytes()) for tensor in tensors]


class Stream:
    """A stream that writes down who waits for whom."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self._calls = name, calls

    def wait_stream(self, other: Stream) -> None:
        self._calls.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Calls to CUDA in their order. A capture reserves 1,000 bytes."""
    calls: list[str] = []
    reserved_bytes = [0]

    class Generator:
        def clone_state(self) -> str:
            return "a state of its own"

        def graphsafe_set_state(self, state: str) -> None:
            calls.append(f"generator in {state}")

    class Graph:
        def capture_begin(self, *, pool: object, capture_error_mode: str) -> None:
            calls.append(f"begin in {pool}, {capture_error_mode}")
            reserved_bytes[0] += 1000

        def capture_end(self) -> None:
            calls.append("end")

        def replay(self) -> None:
            calls.append("replay")

    @contextmanager
    def on_stream(stream: Stream) -> Iterator[None]:
        calls.append(f"on {stream.name}")
        yield
        calls.append(f"off {stream.name}")

    stand_ins = {
        "CUDAGraph": Graph,
        "default_generators": {CPU.index: Generator()},
        "Stream": lambda device: Stream("side", calls),
        "current_stream": lambda device: Stream("main", calls),
        "graph_pool_handle": lambda: "pool",
        "empty_cache": lambda: calls.append("memory back"),
        "memory_reserved": lambda device: reserved_bytes[0],
        "stream": on_stream,
    }
    monkeypatch.setattr(fast_paths, "_used", set())
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    end = lambda index, pool: calls.append(f"end of {pool}")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    side_stream.cache_clear()
    graph_pool.cache_clear()
    yield calls
    side_stream.cache_clear()
    graph_pool.cache_clear()


def make(calls: list[str], *, is_required: bool = False, observer: Observer | None = None) -> CudaGraphs:
    return CudaGraphs(CPU, observer or Observer(), is_required=is_required)


def test_a_step_runs_once_then_is_captured_on_the_side_stream(calls: list[str]) -> None:
    replay = make(calls)(lambda: calls.append("step"))
    empty, begin = ["begin in pool, thread_local", "end"], "begin in pool, thread_local"
    steps = ["on side", "step", *empty, begin, "step", "end", "off side"]
    assert calls == ["side waits for main", *steps, "main waits for side"]
    assert replay is not None
    assert fast_paths.fast_paths() == ["cuda_graphs"]
    replay()
    assert calls[-1] == "replay"


def test_generations_share_one_stream_and_one_pool_whose_memory_is_temporary(calls: list[str]) -> None:
    first, second = Tags(), Tags()
    for tags in (first, second):
        graphs = make(calls, observer=tags)
        graphs(lambda: None)
        graphs(lambda: None)
    # An observer of a later generation is told of all that the pool holds.
    assert first.sizes == [("temporary", 1000)] * (1 + 2)
    assert second.sizes == [("temporary", 1000)] * (3 + 4)
    assert side_stream.cache_info().currsize == 1
    assert calls.count("begin in pool, thread_local") == 5  # an empty graph keeps the pool


def failing_at(error: Exception, *numbers: int) -> Callable[[], None]:
    """A step whose calls of these numbers raise."""
    runs = iter(range(1, 100))

    def step() -> None:
        if next(runs) in numbers:
            raise error

    return step


def test_a_failed_capture_leaves_the_steps_to_run_one_by_one(calls: list[str]) -> None:
    graphs = make(calls)
    with pytest.warns(RuntimeWarning, match="run without CUDA graphs: operation not permitted$"):
        assert graphs(failing_at(RuntimeError("operation not permitted\nlong advice"), 2)) is None
    assert fast_paths.fast_paths() == []
    assert calls[-5:] == ["end", *FORGOTTEN, "off side", "main waits for side"]
    del calls[:]
    assert graphs(lambda: calls.append("step")) is None
    assert calls == ["step"]
    assert make(calls)(lambda: None) is not None
    assert calls.count("begin in pool, thread_local") == 2  # the next generation makes another pool, with a keeper


def test_a_capture_that_cannot_be_ended_is_forgotten_too(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter([None, RuntimeError("unjoined work"), RuntimeError("not capturing")])

    def end(graph: object) -> None:
        error = next(ends)
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", end)
    with pytest.warns(RuntimeWarning, match="run without CUDA graphs: unjoined work$"):
        assert make(calls)(lambda: None) is None
    assert calls[-4:-2] == FORGOTTEN
    assert not list(ends)


def test_a_required_capture_that_fails_raises(calls: list[str]) -> None:
    with pytest.raises(RuntimeError, match="not permitted"):
        make(calls, is_required=True)(failing_at(RuntimeError("operation not permitted"), 2))


def test_a_capture_that_runs_out_of_memory_is_tried_once_more_with_what_torch_keeps(calls: list[str]) -> None:
    assert make(calls)(failing_at(torch.OutOfMemoryError("full"), 2)) is not None
    assert calls.count("memory back") == 1
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        make(calls)(failing_at(torch.OutOfMemoryError("full"), 2, 3))


def test_a_step_that_fails_by_itself_is_no_failed_capture(calls: list[str]) -> None:
    with pytest.raises(RuntimeError, match="wrong"):
        make(calls)(failing_at(RuntimeError("wrong"), 1))


def test_only_real_tensors_on_cuda_are_captured() -> None:
    assert make_capture(torch.zeros(1), Observer(), is_required=True) is run_eagerly
    with FakeTensorMode():
        fake = torch.empty(2, device="cuda:0")
        assert make_capture(fake, Observer(), is_required=True) is run_eagerly
    assert [takes_graphs(fake, choice) for choice in ("auto", "on", "off")] == [True, True, False]
    assert not takes_graphs(torch.zeros(1), "auto")
