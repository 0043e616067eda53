"""A case's passes over one step: warm-up, timing, memory, profiler; and the record's objects from what they found."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from rlhfbench.measure import host
from rlhfbench.measure.ceilings import measure_ceilings
from rlhfbench.measure.clock import StepClock
from rlhfbench.measure.ledger import ACTIVATION_PARTS, MODEL_PARTS, Ledger, block_bytes
from rlhfbench.measure.profile import PhaseProfiler
from rlhfbench.measure.settings import MeasureSettings
from rlhfbench.measure.stopping import Reason, StoppingRule
from rlhfbench.measure.timeline import Timeline
from rlhfbench.measure.workspaces import workspace_bytes
from rlhfkernels.config.case import Case
from rlhfkernels.methods.program import Phase
from rlhfkernels.observer import Observer
from rlhfkernels.training.step import build_step
from rlhfkernels.training.work import Work, phase_work

Notify = Callable[[str], None]


class Stats(Protocol):
    """What a step says of itself when it is done."""

    def check_finite(self) -> None:
        """Raises NumericalError."""


class Step(Protocol):
    """What is measured: see ``rlhfkernels.training.step``."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """In the order in which they run."""

    def run(self, observer: Observer) -> Stats:
        """One complete step on the next batch."""

    def persistent_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """What lives between steps, each with its part."""

    def trained_parameters(self) -> Sequence[torch.nn.Parameter]:
        """What gets gradients."""

    def data_summary(self) -> dict[str, Any]:
        """The ``prompts`` object of the record."""

    @property
    def trunk_taken(self) -> str:
        """How the actor's trunk is run."""

    @property
    def backend_taken(self) -> str:
        """How the ops between the products are computed."""


# Views of memory from outside the ledger; what is not there to be asked is nothing.
OUTER_VIEWS = (
    "allocator_peak_bytes",
    "allocator_reserved_bytes",
    "workspace_bytes",
    "driver_peak_bytes",
    "host_peak_bytes",
)


class Announcer(Observer):
    """Tells of each phase as it begins, before other observers hear of it, one after the other."""

    def __init__(self, notify: Notify, *inner: Observer) -> None:
        self._notify = notify
        self._inner = inner
        self._last: str | None = None

    def enter_phase(self, name: str) -> None:
        """Announces the phase, once for all its stretches in a row."""
        if name != self._last:
            self._last = name
            self._notify(f"phase:{name}")
        for observer in self._inner:
            observer.enter_phase(name)

    def exit_phase(self, name: str) -> None:
        """Passes it on."""
        for observer in self._inner:
            observer.exit_phase(name)

    def tag(self, part: str, tensors: Iterable[torch.Tensor]) -> None:
        """Passes it on."""
        tensors = list(tensors)
        for observer in self._inner:
            observer.tag(part, tensors)


def run_passes(
    case: Case, settings: MeasureSettings, notify: Notify, step_done: Callable[[], object]
) -> dict[str, Any]:
    """What ``rlhfbench.measure.measure_case`` promises."""
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    notify("build")
    step = build_step(case)
    with _quiet_collector():
        steps_s, reason, views = timing_pass(step, case.device, settings, notify)
        notify("memory")
        timeline = Timeline() if settings.timeline else None
        ledger = memory_pass(step, case.device, notify, timeline)
        memory = memory_object(ledger, views)
        if settings.profile_dir is not None:
            notify("profile")
            profiler = PhaseProfiler(settings.profile_dir, case.id, case.device)
            step.run(Announcer(notify, profiler)).check_finite()
    latency = latency_object(step.phases, steps_s, case.batch_size, reason)
    work, prompts = phase_work(step), step.data_summary()
    engine, kernels = step.trunk_taken, step.backend_taken
    notify("ceilings")
    del step
    step_done()
    ceilings = settings.ceilings
    if ceilings is None:
        gc.collect()  # the ceilings' buffers may need the step's room, and models refer to themselves
        ceilings = measure_ceilings(case.device, getattr(torch, case.dtype))
    return {
        "memory": memory,
        "latency": latency,
        "work": work_object(work, ceilings, latency),
        "prompts": prompts,
        "engine": engine,
        "kernels": kernels,
        "ceilings": ceilings,
        "timeline": None if timeline is None else timeline.to_dict(ledger.peaks),
    }


def timing_pass(
    step: Step, device: str, settings: MeasureSettings, notify: Notify
) -> tuple[list[dict[str, float]], Reason, dict[str, int | None]]:
    """Warms up, then times steps until the stopping rule says why to stop.

    What costs nothing to know is taken here too, where nothing disturbs it: the peaks that the CUDA allocator and the
    kernel keep by themselves.

    Returns:
        Seconds by phase of each timed step, the reason, and the views of memory from outside the ledger.
    """
    rule = StoppingRule(precision=settings.precision, budget_s=settings.time_budget_s)
    clock = StepClock(device)
    started_s = time.perf_counter()
    notify("warm-up")
    warm_up_s: list[float] = []
    observer: Observer = Announcer(notify, clock)
    while not rule.is_warm(warm_up_s):
        step.run(observer).check_finite()
        warm_up_s.append(sum(clock.take().values()))
        observer = clock
    notify("timing")
    steps_s: list[dict[str, float]] = []
    reason: Reason | None = None
    with _named_failure(clock, notify), _peaks_outside(device) as views:
        while reason is None:
            step.run(clock).check_finite()
            steps_s.append(clock.take())
            gc.collect()
            totals_s = [sum(phases.values()) for phases in steps_s]
            reason = rule.reason_to_stop(totals_s, time.perf_counter() - started_s)
    return steps_s, reason, views


def memory_pass(step: Step, device: str, notify: Notify, timeline: Timeline | None = None) -> Ledger:
    """One step under a ledger, which has seen it then, and so has ``timeline``."""
    gc.collect()
    ledger = Ledger(device, on_change=None if timeline is None else timeline.note, block_bytes=block_bytes(device))
    watched_step(step, ledger, Announcer(notify, ledger, *((timeline,) if timeline else ()))).check_finite()
    return ledger


def watched_step(step: Step, ledger: Ledger, observer: Observer) -> Stats:
    """One step under ``ledger``, which is told first what lives between steps."""
    with ledger:
        for part, tensor in step.persistent_tensors():
            ledger.tag(part, (tensor,))
        ledger.watch_gradients(step.trained_parameters())
        return step.run(observer)


def memory_object(ledger: Ledger, views: dict[str, int | None]) -> dict[str, Any]:
    """The record's ``memory`` object from a ledger that has seen a step, and the views from outside it."""
    assert ledger.peak_phase is not None, "a step has phases"
    peak, largest = ledger.peaks[ledger.peak_phase], ledger.largest
    return {
        "model_bytes": sum(peak.parts[part] for part in MODEL_PARTS),
        "activation_bytes": sum(peak.parts[part] for part in ACTIVATION_PARTS),
        "rollout_bytes": peak.parts["rollout"],
        "total_bytes": peak.total_bytes,
        "peak_phase": ledger.peak_phase,
        "parts": peak.parts,
        "phases": {
            name: {"total_bytes": snapshot.total_bytes, "parts": snapshot.parts}
            for name, snapshot in ledger.peaks.items()
        },
        "largest_tensor": None
        if largest is None
        else {"bytes": largest.num_bytes, "shape": list(largest.shape), "op": largest.op},
        "views": {
            "ledger_peak_bytes": peak.total_bytes,
            **views,
            "allocator_rest_bytes": _rest(peak.total_bytes, views),
        },
    }


def _rest(ledger_peak_bytes: int, views: dict[str, int | None]) -> int | None:
    """What the CUDA allocator handed out at its peak beyond the ledger's and the libraries' workspaces."""
    allocated, workspaces = views.get("allocator_peak_bytes"), views.get("workspace_bytes")
    return None if allocated is None or workspaces is None else allocated - ledger_peak_bytes - workspaces


def latency_object(
    phases: Sequence[Phase], steps_s: Sequence[dict[str, float]], batch_size: int, reason: Reason
) -> dict[str, Any]:
    """The record's ``latency`` object. The sums are of the phases' medians, so that they add up.

    Args:
        phases: the step's phases; one that did not run took 0 s.
        steps_s: seconds by phase of each timed step.
        batch_size: samples a step.
        reason: why the timing pass stopped.
    """
    samples_s = {phase.name: [step_s.get(phase.name, 0.0) for step_s in steps_s] for phase in phases}
    medians_s = {name: statistics.median(samples) for name, samples in samples_s.items()}
    kinds_s = {
        kind: sum(medians_s[phase.name] for phase in phases if phase.kind == kind) / batch_size
        for kind in ("inference", "update")
    }
    kinds = {phase.kind for phase in phases}
    return {
        "inference_s_per_sample": kinds_s["inference"] if "inference" in kinds else None,
        "update_s_per_sample": kinds_s["update"] if "update" in kinds else None,
        "total_s_per_sample": kinds_s["inference"] + kinds_s["update"],
        "phases": {name: {"median_s": medians_s[name], "samples_s": samples} for name, samples in samples_s.items()},
        "stopped_because": reason,
    }


def work_object(work: dict[str, Work], ceilings: dict[str, float], latency: dict[str, Any]) -> dict[str, Any]:
    """The record's ``work`` object: the least work of each phase, and the least time that the device needs for it."""
    floors_s = {
        name: item.floor_s(ceilings["matmul_flops_per_s"], ceilings["copy_bytes_per_s"]) for name, item in work.items()
    }
    measured_s = sum(phase["median_s"] for phase in latency["phases"].values())
    return {
        "phases": {
            name: {"flops": item.flops, "bytes": item.bytes, "floor_s": floors_s[name]} for name, item in work.items()
        },
        "floor_fraction": sum(floors_s.values()) / measured_s,
    }


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """Keeps Python's cyclic collector from running at a moment of its own choice: it is run between the timed steps.

    What lives before is frozen, so that those collections look at little.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextmanager
def _named_failure(clock: StepClock, notify: Notify) -> Iterator[None]:
    """The timed steps announce no phases; if one fails, the phase that it was in is told then."""
    try:
        yield
    except BaseException:
        if clock.last_phase is not None:
            notify(f"phase:{clock.last_phase}")
        raise


@contextmanager
def _peaks_outside(device: str) -> Iterator[dict[str, int | None]]:
    """The peaks that others keep, from here to the end of the block; they are in the dictionary after it."""
    views: dict[str, int | None] = dict.fromkeys(OUTER_VIEWS)  # the driver's is not seen from inside
    on_cuda = torch.device(device).type == "cuda"
    host.reset_peak()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    yield views
    views["host_peak_bytes"] = host.peak_resident_bytes()
    if on_cuda:
        views["allocator_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        views["allocator_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        views["workspace_bytes"] = workspace_bytes(device)
