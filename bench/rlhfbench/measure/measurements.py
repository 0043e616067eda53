"""The measurements of a case: timing, memory and profile of one step, and the record's objects made from them."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from rlhfbench.measure import host, ranks
from rlhfbench.measure.ceilings import measure_ceilings
from rlhfbench.measure.clock import StepClock
from rlhfbench.measure.injection import InjectedStep
from rlhfbench.measure.interference import Interference
from rlhfbench.measure.ledger import ACTIVATION_PARTS, Ledger, block_bytes
from rlhfbench.measure.options import MeasurementOptions
from rlhfbench.measure.profile import num_profiled_steps, profile_step
from rlhfbench.measure.statistic import DEFAULT_BLOCKS
from rlhfbench.measure.stopping import Reason, StoppingRule
from rlhfbench.measure.tally import MODEL_PARTS, Tally
from rlhfbench.measure.timeline import Timeline
from rlhfbench.measure.turns import Turns
from rlhfbench.measure.user_step import load_step
from rlhfbench.measure.workspaces import workspace_bytes
from rlhfkernels.config.case import Case
from rlhfkernels.errors import ModelError
from rlhfkernels.methods.program import Phase
from rlhfkernels.observer import Observer
from rlhfkernels.ops.taken import taken
from rlhfkernels.parallel.world import ALONE, World
from rlhfkernels.training.step import TrainingStep, build_step
from rlhfkernels.training.work import phase_work

Notify = Callable[[str], None]

# Views of memory from outside the ledger; ``None`` when unavailable.
OUTER_VIEWS = (
    "allocator_peak_bytes",
    "allocator_reserved_bytes",
    "workspace_bytes",
    "driver_peak_bytes",
    "host_peak_bytes",
)


# The ceilings, in the order in which ``Work.floor_s`` takes them.
RATES = ("matmul_flops_per_s", "copy_bytes_per_s", "read_bytes_per_s")
# A model that takes longer to build has one block, and no interval: four builds would take longer than all its steps.
MAX_BUILD_S = 10.0

# Largest magnitude of a statistic of the first step that rounding explains, by dtype. ``ratio_error`` is a maximum over
# tokens, ``kl`` their mean, ``reference_error`` a maximum over the means of sequences. In bfloat16, over 16 models and
# 2 to 5 seeds, the largest of the first two are 0.25 and 0.007 with real weights (SmolLM2-135M, 192 tokens), and 0.88
# and 0.017 where rounding sends a token to another expert (Mixtral).
AGREEMENT = {
    "reference_error": {"float64": 1e-4, "float32": 1e-2, "bfloat16": 1.0},
    "ratio_error": {"float64": 1e-4, "float32": 1e-2, "bfloat16": 1.0},
    "kl": {"float64": 1e-5, "float32": 1e-3, "bfloat16": 0.05},
}


# What disagrees, where it is not decoding and the full forward.
_READINGS = {"reference_error": "the policy and the reference's log-probabilities"}


class Stats(Protocol):
    """Statistics of one step."""

    def check_finite(self) -> None:
        """Raises NumericalError if a loss, a gradient norm or the like is not finite."""

    def to_dict(self) -> dict[str, float | None]:
        """Returns the ``stats`` object of the record."""


class Step(Protocol):
    """A training step as the measurements see it; see ``rlhfkernels.training.step``."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases in the order in which they run."""

    def run(self, observer: Observer) -> Stats:
        """Runs one complete step on the next batch."""

    def persistent_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Yields (part, tensor) for everything that lives between steps."""

    def trained_parameters(self) -> Sequence[torch.nn.Parameter]:
        """Returns the parameters that get gradients."""

    def data_summary(self) -> dict[str, Any]:
        """Returns the ``prompts`` object of the record."""

    @property
    def trunk_taken(self) -> str:
        """The trunk that the actor runs on: ``fast`` or ``plain``."""

    @property
    def attention_taken(self) -> str:
        """The attention implementation of the actor's trunk: ``sdpa`` or ``eager``."""

    @property
    def backend_taken(self) -> str:
        """The backend of the ops: ``triton``, ``native`` or ``torch``."""


class Announcer(Observer):
    """Announces each phase as it begins, and passes every call on to other observers, in their order."""

    def __init__(self, notify: Notify, *inner: Observer) -> None:
        self._notify = notify
        self._inner = inner
        self._last: str | None = None

    def enter_phase(self, name: str) -> None:
        """Announces the phase, once for consecutive stretches."""
        if name != self._last:
            self._last = name
            self._notify(f"phase:{name}")
        for observer in self._inner:
            observer.enter_phase(name)

    def exit_phase(self, name: str) -> None:
        """Passes the call on."""
        for observer in self._inner:
            observer.exit_phase(name)

    def tag(self, part: str, tensors: Iterable[torch.Tensor]) -> None:
        """Passes the call on."""
        tensors = list(tensors)
        for observer in self._inner:
            observer.tag(part, tensors)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Result of the timing measurement.

    Attributes:
        steps_s: Seconds by phase of each timed step: of several ranks, those of the slowest.
        own_steps_s: The same, of this rank.
        reason: Why it stopped.
        interference: What else used the machine; see ``Interference.take``.
        views: Memory views from outside the ledger.
        stats: Statistics of the first warm-up step: the step that starts from the initial weights.
    """

    steps_s: list[dict[str, float]]
    own_steps_s: list[dict[str, float]]
    reason: Reason
    interference: dict[str, Any]
    views: dict[str, int | None]
    stats: dict[str, float | None]


def run_measurements(
    case: Case,
    options: MeasurementOptions,
    notify: Notify,
    step_begins: Callable[[], object],
    world: World | None = None,
    enter_phase: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Implements ``rlhfbench.measure.measure_case``."""
    in_world, world = world is not None, world or ALONE
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    # Before the step, whose models would need a slow collection to make room for the buffers after it.
    # Not beside another process, and a comparison of two sides needs no floor.
    ceilings: dict[str, float] | None = None
    if options.turns is None:
        notify("ceilings")
        world.barrier()  # all ranks at once: a rank's ceilings are those that it has beside the others
        ceilings = measure_ceilings(case.device, getattr(torch, case.dtype))
    step_begins()
    notify("build")
    started_s = time.perf_counter()
    step = _build(case, options, world)
    build_s = time.perf_counter() - started_s
    # Counted now: a prepared step has freed models.
    work = phase_work(cast(TrainingStep, step)) if options.step is None else {}
    result: dict[str, Any] = {}
    with _manual_gc():
        is_own = options.step is None
        prepared = prepare_step(cast(TrainingStep, step), case.device, notify) if is_own else Prepared()
        is_short = build_s + prepared.data_set_s <= MAX_BUILD_S
        num_blocks = world.broadcast(options.num_blocks or (DEFAULT_BLOCKS if is_short else 1))
        rule = StoppingRule(precision=options.precision, budget_s=options.time_budget_s / num_blocks)
        timing = time_steps(step, case, rule, notify, options.turns, world=world, enter_phase=enter_phase)
        if options.block == 0:
            result = _measure_once(step, case, options, timing, prepared, notify, world if in_world else None)
    if options.block == 0:
        result["latency"]["num_blocks"] = num_blocks
        result["work"] = {"phases": {name: dataclasses.asdict(item) for name, item in work.items()}}
    names = [phase.name for phase in step.phases if phase.kind != "prepare"]
    result["block"] = {
        "started_at": started_at,
        "build_s": build_s,
        "prepare_s_per_sample": prepared.s_per_sample,
        "phases": {name: [step_s.get(name, 0.0) for step_s in timing.steps_s] for name in names},
        "stopped_because": timing.reason,
        "in_turns": options.turns is not None,
        "interference": timing.interference,
        "ceilings": ceilings,
        "floors_s": {name: item.floor_s(*(ceilings[rate] for rate in RATES)) for name, item in work.items()}
        if ceilings
        else None,
        "error": None,
    }
    return result


def _build(case: Case, options: MeasurementOptions, world: World) -> Step:
    step: Step = build_step(case, world=world) if options.step is None else load_step(options.step, case)
    return step if options.injected is None else cast(Step, InjectedStep(step, case.device, **options.injected))


def _measure_once(
    step: Step,
    case: Case,
    options: MeasurementOptions,
    timing: Timing,
    prepared: Prepared,
    notify: Notify,
    world: World | None,
) -> dict[str, Any]:
    """Measures what a case has once: memory, collectives, profile. Returns the record's objects without times."""
    notify("memory")
    (world or ALONE).barrier()
    timeline = Timeline() if options.timeline else None
    ledger = measure_memory(step, case.device, notify, timeline)
    followed = None if timeline is None else timeline.to_dict(ledger.peaks)
    if prepared.ledger is not None:
        ledger.add_phases(prepared.ledger)
    phases = [phase for phase in step.phases if phase.kind != "prepare"]
    memory = memory_object(ledger, highest_views(prepared.views, timing.views))

    def run(observer: Observer) -> None:
        step.run(Announcer(notify, observer)).check_finite()

    of_world: dict[str, Any] = {}
    if world is not None:
        notify("collectives")
        counter = ranks.measure_collectives(run, case.device, world)
        of_world["world"], memory, followed = ranks.gather(case, world, counter, timing.own_steps_s, memory, followed)
    if options.profile_dir is not None:
        notify("profile")
        if world is None or world.rank == 0:
            profile_step(run, Path(options.profile_dir), case.id, case.device)
        else:  # the first rank's profile needs the others' steps; theirs would take its time and double its size
            for _ in range(num_profiled_steps(case.device)):
                run(Observer())
    return {
        **of_world,
        "memory": memory,
        "latency": {"phases": {phase.name: {"kind": phase.kind} for phase in phases}},
        "stats": timing.stats,
        "prompts": step.data_summary(),
        "engine": step.trunk_taken,
        "attention": step.attention_taken,
        "kernels": step.backend_taken,
        "taken": ", ".join(taken()),
        "num_threads": torch.get_num_threads(),
        "timeline": followed,
    }


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Memory and time of the phase ``prepare``; nothing for a step without one.

    Attributes:
        ledger: Has seen the phase over one batch.
        data_set_s: Seconds of the phase over the data set.
        s_per_sample: The same, per data row.
        views: Memory views from outside the ledger.
    """

    ledger: Ledger | None = None
    data_set_s: float = 0.0
    s_per_sample: float | None = None
    views: dict[str, int | None] = dataclasses.field(default_factory=dict)


def prepare_step(step: TrainingStep, device: str, notify: Notify) -> Prepared:
    """Runs the phase ``prepare`` over one batch under a ledger, which also warms it up, then over the data set."""
    if all(phase.kind != "prepare" for phase in step.phases):
        return Prepared()
    ledger, clock = Ledger(device, block_bytes=block_bytes(device)), StepClock(device)
    with _outer_peaks(device) as views:
        with _ledger_of(step, ledger):
            step.prepare(Announcer(notify, ledger), num_batches=1)
        step.prepare(clock)
    data_set_s = sum(clock.take().values())
    return Prepared(ledger=ledger, data_set_s=data_set_s, s_per_sample=data_set_s / step.num_data_rows, views=views)


def highest_views(*found: Mapping[str, int | None]) -> dict[str, int | None]:
    """The highest number of every view, ``None`` where none has one."""
    given = {name: [views.get(name) for views in found] for name in OUTER_VIEWS}
    return {name: max((n for n in numbers if n is not None), default=None) for name, numbers in given.items()}


def time_steps(
    step: Step,
    case: Case,
    rule: StoppingRule,
    notify: Notify,
    turns_path: str | None = None,
    *,
    world: World = ALONE,
    enter_phase: Callable[[str], object] | None = None,
) -> Timing:
    """Times one block: warms up, then times steps until the stopping rule ends it, or a referee if there is one.

    The peaks that the CUDA allocator and the kernel keep by themselves are read here too: they cost nothing, and no
    instrument adds to them.

    All ranks begin a timed step together, and rank 0 decides for all when the warm-up and the timing end. What they
    send each other for that is outside of the timed phases.
    """
    clock = StepClock(case.device, enter_phase)
    started_s = time.perf_counter()
    notify("warm-up")
    warm_up_s: list[float] = []
    first: dict[str, float | None] = {}
    observer: Observer = Announcer(notify, clock)
    while not world.broadcast(rule.is_warm(warm_up_s)):
        stats = step.run(observer)
        stats.check_finite()
        if not first:
            first = stats.to_dict()
            check_agreement(first, case.dtype)
        warm_up_s.append(sum(clock.take().values()))
        observer = clock
    notify("timing")
    steps_s: list[dict[str, float]] = []
    reason: Reason | None = None
    turns = None if turns_path is None or world.rank else Turns(turns_path)
    interference = Interference(case.device)
    with _named_failure(clock, notify), _outer_peaks(case.device) as views:
        while reason is None:
            if turns_path is not None:
                interference.pause()
                # Without any turn, since the other side failed, one step makes the block whole.
                if not world.broadcast(turns is None or turns.wait()) and steps_s:
                    break
                interference.resume()
            world.barrier()
            step.run(clock).check_finite()
            steps_s.append(clock.take())
            gc.collect()
            if turns_path is not None:
                world.barrier()
                if turns is not None:
                    turns.done()
                continue
            totals_s = [sum(phases.values()) for phases in steps_s]
            reason = world.broadcast(rule.reason_to_stop(totals_s, time.perf_counter() - started_s))
    interference.pause()
    return Timing(
        steps_s=ranks.slowest_steps(steps_s, world),
        own_steps_s=steps_s,
        reason=reason or "budget",
        interference=interference.take(ranks.own_s(interference.own_s, world)),
        views=views,
        stats=first,
    )


def check_agreement(stats: Mapping[str, float | None], dtype: str) -> None:
    """Refuses a first step in which two readings of the initial weights give different log-probabilities.

    Decoding and the full forward pass: the probability ratio is 1 and KL is 0 but for rounding. The policy and the
    columns that were read from the reference, perhaps once for the data set: they differ by rounding alone.

    Args:
        stats: Of the first step. KL is checked only beside ``ratio_error``.
        dtype: Of the weights.

    Raises:
        ModelError: They disagree.
    """
    for name, limits in AGREEMENT.items():
        readings = _READINGS.get(name, "decoding and the full forward")
        value = stats.get(name) if name in _READINGS or "ratio_error" in stats else None
        if value is not None and abs(value) > limits[dtype]:
            raise ModelError(
                f"{readings} disagree by {abs(value):.2g} ({name} of the first step), and {dtype} explains "
                f"{limits[dtype]:.2g}."
            )


def measure_memory(step: Step, device: str, notify: Notify, timeline: Timeline | None = None) -> Ledger:
    """Runs one step under a new ledger and returns the ledger; ``timeline`` follows it."""
    gc.collect()
    ledger = Ledger(
        device,
        on_change=None if timeline is None else timeline.note,
        on_lifetime=None if timeline is None else timeline.note_lifetime,
        block_bytes=block_bytes(device),
    )
    run_under_ledger(step, ledger, Announcer(notify, ledger, *((timeline,) if timeline else ()))).check_finite()
    return ledger


def run_under_ledger(step: Step, ledger: Ledger, observer: Observer) -> Stats:
    """Runs one step inside ``ledger``, after declaring everything that lives between steps."""
    with _ledger_of(step, ledger):
        return step.run(observer)


@contextmanager
def _ledger_of(step: Step, ledger: Ledger) -> Iterator[None]:
    """Enters ``ledger`` and declares everything that lives between steps."""
    with ledger:
        for part, tensor in step.persistent_tensors():
            ledger.tag(part, (tensor,))
        ledger.track_gradients(step.trained_parameters())
        yield


def persistent_model_bytes(phases: Iterable[Mapping[str, int]]) -> int:
    """Weights, whole gradients and optimizer states: the "model" column of Hydra-RLHF's Table 1.

    It is the highest sum of the model parts over the phases. The phase with the highest total often has no gradients.

    Args:
        phases: Bytes by part at the peak of each phase.
    """
    return max(sum(parts[part] for part in MODEL_PARTS) for parts in phases)


def memory_object(ledger: Ledger | Tally, views: dict[str, int | None]) -> dict[str, Any]:
    """Returns the record's ``memory`` object.

    Args:
        ledger: Has seen one step.
        views: Memory views from outside the ledger, by the names in ``OUTER_VIEWS``.
    """
    assert ledger.peak_phase is not None, "a step has phases"
    peaks, largest = ledger.peaks, ledger.largest
    peak = peaks[ledger.peak_phase]
    return {
        "model_bytes": sum(peak.parts[part] for part in MODEL_PARTS),
        "activation_bytes": sum(peak.parts[part] for part in ACTIVATION_PARTS),
        "rollout_bytes": peak.parts["rollout"],
        "total_bytes": peak.total_bytes,
        "persistent_model_bytes": persistent_model_bytes(snapshot.parts for snapshot in peaks.values()),
        "peak_phase": ledger.peak_phase,
        "parts": peak.parts,
        "phases": {
            name: {"total_bytes": snapshot.total_bytes, "parts": snapshot.parts} for name, snapshot in peaks.items()
        },
        "largest_tensor": None
        if largest is None
        else {"bytes": largest.num_bytes, "shape": list(largest.shape), "op": largest.op},
        "views": {
            "ledger_peak_bytes": peak.total_bytes,
            **views,
            "allocator_rest_bytes": _allocator_rest_bytes(peak.total_bytes, views),
        },
    }


def _allocator_rest_bytes(ledger_peak_bytes: int, views: dict[str, int | None]) -> int | None:
    """The CUDA allocator's peak beyond the ledger's peak and the library workspaces; ``None`` when unavailable."""
    allocated, workspaces = views.get("allocator_peak_bytes"), views.get("workspace_bytes")
    return None if allocated is None or workspaces is None else allocated - ledger_peak_bytes - workspaces


@contextmanager
def _manual_gc() -> Iterator[None]:
    """Turns automatic garbage collection off, so that it never runs inside a timed step.

    Existing objects are frozen: the collections between timed steps need not traverse them.
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
    """Announces the phase in which a step failed: timed steps announce none while they run."""
    try:
        yield
    except BaseException:
        if clock.last_phase is not None:
            notify(f"phase:{clock.last_phase}")
        raise


@contextmanager
def _outer_peaks(device: str) -> Iterator[dict[str, int | None]]:
    """Yields a dictionary that has, after the block, the peaks as allocator and operating system saw them.

    The allocator's are of the block. The resident set's is since the process began, as it is for a case that fails. The
    driver's view stays ``None``: it is sampled from outside this process.
    """
    views: dict[str, int | None] = dict.fromkeys(OUTER_VIEWS)
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    yield views
    views["host_peak_bytes"] = host.peak_resident_bytes()
    if on_cuda:
        views["allocator_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        views["allocator_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        views["workspace_bytes"] = workspace_bytes(device)
