"""Captures of a decode step as a CUDA graph: one launch for all its kernels.

Not yet run on a GPU.
"""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from rlhfkernels.observer import Observer
from rlhfkernels.ops.fast_paths import CUDA_GRAPHS, note_fast_path

Step = Callable[[], None]


class Capture(Protocol):
    """Makes a step cheaper to repeat."""

    def __call__(self, step: Step) -> Step | None:
        """Runs ``step`` once, and returns what repeats it on the same memory; ``None`` if only ``step`` itself does."""
        ...


def run_eagerly(step: Step) -> None:
    """Runs ``step``: the capture of a device without graphs."""
    step()


def make_capture(x: torch.Tensor, observer: Observer, *, is_required: bool) -> Capture:
    """Returns the capture for tensors like ``x``; fake tensors have nothing to capture.

    Args:
        x: any tensor of the step.
        observer: told of the graphs' memory.
        is_required: raise where a step cannot be captured, instead of running it eagerly.
    """
    if x.device.type != "cuda" or isinstance(x, FakeTensor):
        return run_eagerly
    return CudaGraphs(x.device, observer, is_required=is_required)


class CudaGraphs:
    """Captures steps on one CUDA device.

    Args:
        device: of the steps.
        observer: told of the pool's memory, as ``temporary``.
        is_required: raise where a step cannot be captured, instead of running it eagerly.
    """

    def __init__(self, device: torch.device, observer: Observer, *, is_required: bool) -> None:
        self._device, self._observer, self._is_required = device, observer, is_required
        self._works = True

    def __call__(self, step: Step) -> Step | None:
        """Runs ``step`` once, and returns what repeats it on the same memory; see ``Capture``.

        The run is eager. It computes what the caller asked for, and lets libraries allocate, compile and load their
        kernels, which a capture must not do. The host does not wait for the device.

        Raises:
            RuntimeError: the step cannot be captured, and graphs are required.
        """
        if not self._works:
            step()
            return None
        stream, current = side_stream(self._device), torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            step()
            replay = self._captured(step)
        current.wait_stream(stream)
        return replay

    def _captured(self, step: Step) -> Step | None:
        try:
            try:
                replay = self._capture(step)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()  # a capture cannot take the blocks that torch keeps for tensors
                replay = self._capture(step)
        except RuntimeError as error:
            if self._is_required or isinstance(error, torch.OutOfMemoryError):
                raise
            self._works = False
            reason = (str(error).splitlines() or [""])[0]
            warnings.warn(f"decode steps run without CUDA graphs: {reason}", RuntimeWarning, stacklevel=2)
            return None
        self._observer.tag("temporary", graph_pool(self._device).held)
        note_fast_path(CUDA_GRAPHS)
        return replay

    def _capture(self, step: Step) -> Step:
        """Returns what replays ``step``.

        Raises:
            RuntimeError: the step cannot be captured. The next capture takes another pool, as torch's allocator of
                pinned memory still records the failed one under its own.
        """
        try:
            return graph_pool(self._device).capture(step)
        except RuntimeError:
            graph_pool.cache_clear()
            raise


class GraphPool:
    """The memory pool of all captures on one device. It is made on the stream of captures.

    Its graphs must not run at the same time. The pool lives as long as the process: torch gives the memory of a pool
    without graphs back only when the device is full, so that every generation with a pool of its own would reserve
    more. An empty graph keeps it, as in torch's compiler (``torch/_inductor/cudagraph_trees.py``).

    Args:
        device: of the captures.

    Attributes:
        held: stand for the memory that the pool has reserved, which no tensor owns between replays. They are fake
            tensors: they have sizes and no memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._handle = torch.cuda.graph_pool_handle()
        self.held: list[torch.Tensor] = []
        with warnings.catch_warnings(action="ignore"):  # torch warns of an empty graph
            self._keeper = self._graph_of(lambda: None)

    def capture(self, step: Step) -> Step:
        """Captures ``step`` on the current stream and returns what replays it.

        Raises:
            RuntimeError: the step cannot be captured.
        """
        reserved_bytes = torch.cuda.memory_reserved(self._device)
        graph = self._graph_of(step)
        self._hold(torch.cuda.memory_reserved(self._device) - reserved_bytes)
        replay: Step = graph.replay
        return replay

    def _graph_of(self, step: Step) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with _no_collections():
            # Other threads may allocate meanwhile, as a sampler of memory does.
            graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
            try:
                step()
                graph.capture_end()
            except BaseException:
                with suppress(RuntimeError), warnings.catch_warnings(action="ignore"):  # the first error says more
                    graph.capture_end()
                self._forget_capture()
                raise
        return graph

    def _forget_capture(self) -> None:
        """Ends a failed capture for torch's allocator and default generator, which ``capture_end`` may have left in it.

        The allocator would free no cached memory when it runs out, and the generator would refuse to draw.
        """
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index, self._handle)
        generator = torch.cuda.default_generators[self._device.index]
        generator.graphsafe_set_state(generator.clone_state())

    def _hold(self, num_bytes: int) -> None:
        if num_bytes > 0:
            with FakeTensorMode():
                self.held.append(torch.empty(num_bytes, dtype=torch.uint8, device=self._device))


@contextmanager
def _no_collections() -> Iterator[None]:
    """Keeps the garbage collector from destroying a graph of a reference cycle, which would end the capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@functools.cache
def graph_pool(device: torch.device) -> GraphPool:
    """Returns the pool of ``device``: always the same."""
    return GraphPool(device)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the stream of ``device`` that captures: always the same, as cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
