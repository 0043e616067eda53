"""The measurements of a case: timing, memory and profile of one step, and the record's objects made from them."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from rlhfbench.measure import ranks
from rlhfbench.measure.announcer import Announcer, Notify
from rlhfbench.measure.ceilings import RATES, measure_ceilings
from rlhfbench.measure.clock import StepClock
from rlhfbench.measure.injection import InjectedStep
from rlhfbench.measure.ledger import Ledger, block_bytes
from rlhfbench.measure.memory import highest_views, ledger_of, measure_memory, memory_object, outer_peaks
from rlhfbench.measure.options import BUILD, MeasurementOptions
from rlhfbench.measure.profile import num_profiled_steps, profile_step
from rlhfbench.measure.statistic import DEFAULT_BLOCKS
from rlhfbench.measure.step import Step
from rlhfbench.measure.stopping import StoppingRule
from rlhfbench.measure.timeline import Timeline
from rlhfbench.measure.timing import Timing, time_steps
from rlhfbench.measure.user_step import load_step
from rlhfkernels.config.case import Case
from rlhfkernels.errors import ModelError
from rlhfkernels.observer import Observer
from rlhfkernels.ops.fast_paths import fast_paths
from rlhfkernels.parallel.world import ALONE, World
from rlhfkernels.training.step import TrainingStep, build_step
from rlhfkernels.training.work import phase_work

# A model that takes longer to build has one block, and no interval: four builds would take longer than all its steps.
MAX_BUILD_S = 10.0


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
    ceilings = _ceilings(case, options, notify, world)
    step_begins()
    notify(BUILD)
    started_s = time.perf_counter()
    step = _build(case, options, world)
    build_s = time.perf_counter() - started_s
    work = phase_work(cast(TrainingStep, step)) if options.step is None else {}
    with _manual_gc():
        is_own = options.step is None
        prepared = prepare_step(cast(TrainingStep, step), case.device, notify) if is_own else Prepared()
        is_short = build_s + prepared.data_set_s <= MAX_BUILD_S
        num_blocks = world.broadcast(options.num_blocks or (DEFAULT_BLOCKS if is_short else 1))
        rule = StoppingRule(precision=options.precision, budget_s=options.time_budget_s / num_blocks)
        timing = time_steps(step, case, rule, notify, options.turns, world=world, enter_phase=enter_phase)
        if case.device == "cpu" and _has_used_cuda():
            # A user's own step: nothing would wait for the GPU, and its memory would not count.
            raise ModelError("the step uses CUDA, and the device of its case is cpu: name it with --device cuda.")
        result: dict[str, Any] = {}
        if options.block == 0:
            result = _measure_once(step, case, options, timing, prepared, notify, world if in_world else None)
            result["latency"]["num_blocks"] = num_blocks
            result["work"] = {"phases": {name: dataclasses.asdict(item) for name, item in work.items()}}
    names = [phase.name for phase in step.phases if phase.kind != "prepare"]
    for name in [name for step_s in timing.steps_s for name in step_s if name not in names]:
        raise ModelError(f"the step entered phase '{name}', which is none of its phases: {', '.join(names)}.")
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


def _has_used_cuda() -> bool:
    is_initialized: Any = torch.cuda.is_initialized
    return bool(is_initialized() and any(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))))


def _ceilings(case: Case, options: MeasurementOptions, notify: Notify, world: World) -> dict[str, float] | None:
    """Measures the ceilings; not where two sides take turns: each is beside another process and needs no floor."""
    if options.turns is not None:
        return None
    notify("ceilings")
    world.barrier()  # all ranks at once: a rank's ceilings are those that it has beside the others
    found = measure_ceilings(case.device, getattr(torch, case.dtype))
    torch.cuda.empty_cache()  # up to 2 GiB of buffers: nothing that a small case takes would show beside them
    return found


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
    step.rewind()  # packed rows differ in size: the same in every run, however many steps were timed
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
        _profile(run, Path(options.profile_dir), case, world or ALONE)
    return {
        **of_world,
        "memory": memory,
        "latency": {"phases": {phase.name: {"kind": phase.kind} for phase in phases}},
        "stats": timing.stats,
        "prompts": step.data_summary(),
        "engine": step.trunk_used,
        "attention": step.attention_used,
        "kernels": step.backend_used,
        "fast_paths": ", ".join(fast_paths()),
        "num_threads": torch.get_num_threads(),
        "timeline": followed,
    }


def _profile(run: Callable[[Observer], None], directory: Path, case: Case, world: World) -> None:
    """Profiles the first rank. Its steps need the others', whose profiles would take its time and double its size."""
    if world.rank == 0:
        profile_step(run, directory, case.id, case.device)
        return
    for _ in range(num_profiled_steps(case.device)):
        run(Observer())


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Memory and time of the phase ``prepare``; nothing for a step without one.

    Attributes:
        ledger: Has seen the phase over one batch.
        data_set_s: Seconds of the phase over the data set, those of the slowest rank.
        s_per_sample: The same, per data row of all ranks.
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
    with outer_peaks(device) as views:
        with ledger_of(step, ledger):
            step.prepare(Announcer(notify, ledger), num_batches=1)
        step.prepare(clock)
    data_set_s = max(step.world.gather(sum(clock.take().values())))
    # Every rank reads all rows of a file, and random rows of its own.
    num_rows = step.num_data_rows * (step.world.size if step.case.data_file is None else 1)
    return Prepared(ledger=ledger, data_set_s=data_set_s, s_per_sample=data_set_s / num_rows, views=views)


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
