"""The collectives of a step: calls and bytes by phase, and the seconds that a rank waits in them.

One step apart from the timed ones is observed. A dispatch mode sees every collective, those of torch's C++ reducer
too. Three places wait on a CPU: ``Work.wait`` and ``Future.wait``, which are patched; and the end of a backward pass,
where the C++ reducer waits for the gradients of other ranks. The op after the last collective of a backward pass is its
end, so what follows the collective there is waiting, but for ops.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhfbench.measure.clock import StepClock
from rlhfkernels.observer import Observer

# Ops of the dispatcher by the name of the collective.
COLLECTIVES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "barrier": "barrier",
    "monitored_barrier_": "barrier",
}
_NAMESPACES = ("c10d", "_c10d_functional")
_OUTSIDE = "outside"  # of phases


class CollectiveCounter(TorchDispatchMode, Observer):
    """Observes the collectives of one step, inside a ``with`` block, and its phases.

    Attributes:
        calls: Number of calls by phase and collective.
        num_bytes: Bytes of the whole tensors of these calls on one rank: what is reduced, gathered to, scattered from.
        waiting_s: Seconds in which the rank waited, by phase.
        phase_s: Seconds of the phase in this step.
    """

    def __init__(self, device: str | torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, dict[str, int]] = {}
        self.num_bytes: dict[str, dict[str, int]] = {}
        self.waiting_s: dict[str, float] = {}
        self.phase_s: dict[str, float] = {}
        self._clock = StepClock(device)
        self._running = [_OUTSIDE]
        self._num_unwaited = 0  # collectives issued in a backward pass that Python has not waited for
        self._issued_s = self._op_s = 0.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Skips dynamo's check: it would import the compiler at the first op, and nothing is compiled here."""
        return False

    def enter_phase(self, name: str) -> None:
        """Starts a stretch of phase ``name``."""
        self._running.append(name)
        self._clock.enter_phase(name)

    def exit_phase(self, name: str) -> None:
        """Ends the stretch."""
        self._clock.exit_phase(name)
        self._running.pop()

    def __enter__(self) -> CollectiveCounter:
        self._patches = _patched(self)
        self._patches.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patches.__exit__(*error)
        self.phase_s = self._clock.take()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = COLLECTIVES.get(func._opname) if func.namespace in _NAMESPACES else None
        if name is None:
            return self._run(func, args, kwargs or {})
        self._count(name, args)
        result = func(*args, **(kwargs or {}))
        self._num_unwaited += 1
        self._issued_s, self._op_s = time.perf_counter(), 0.0
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs an op that is no collective."""
        started_s = time.perf_counter()
        result = func(*args, **kwargs)
        spent_s = time.perf_counter() - started_s
        if func.namespace == "_c10d_functional":  # wait_tensor
            self.add_waiting(spent_s)
        else:
            self._op_s += spent_s
        return result

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        calls = self.calls.setdefault(self._running[-1], {})
        calls[name] = calls.get(name, 0) + 1
        num_bytes = self.num_bytes.setdefault(self._running[-1], {})
        # A barrier's tensor stands for nothing.
        payload = 0 if name == "barrier" else max(map(tensor_bytes, args[:2]), default=0)
        num_bytes[name] = num_bytes.get(name, 0) + payload

    def add_waiting(self, seconds: float) -> None:
        """Adds to the waiting of the present phase."""
        phase = self._running[-1]
        self.waiting_s[phase] = self.waiting_s.get(phase, 0.0) + seconds
        self._op_s += seconds
        self._num_unwaited -= 1

    def run_backward(self, backward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a backward pass, and adds what it waits for gradients of other ranks at its end."""
        self._num_unwaited = 0
        result = backward(*args, **kwargs)
        if self._num_unwaited > 0:
            self.add_waiting(max(time.perf_counter() - self._issued_s - self._op_s, 0.0))
        return result


def tensor_bytes(value: Any) -> int:
    """Bytes of the tensors in ``value``: a tensor, or lists of them; 0 for anything else."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


@contextmanager
def _patched(counter: CollectiveCounter) -> Iterator[None]:
    """Times what waits in Python, and backward passes."""
    from torch.autograd import graph

    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (owner, "wait", getattr(owner, "wait"))  # noqa: B009 -- mypy knows no such attribute of every owner
        for owner in (torch.distributed.Work, torch._C.Future)
    ]
    backwards = [(owner, "_engine_run_backward", graph._engine_run_backward) for owner in (graph, torch.autograd)]

    def timed(wait: Callable[..., Any]) -> Callable[..., Any]:
        def wait_timed(*args: Any, **kwargs: Any) -> Any:
            started_s = time.perf_counter()
            try:
                return wait(*args, **kwargs)
            finally:
                counter.add_waiting(time.perf_counter() - started_s)

        return wait_timed

    for owner, name, wait in places:
        setattr(owner, name, timed(wait))
    for module, name, run in backwards:
        setattr(module, name, lambda *args, run=run, **kwargs: counter.run_backward(run, *args, **kwargs))
    try:
        yield
    finally:
        for owner, name, original in [*places, *backwards]:
            setattr(owner, name, original)
