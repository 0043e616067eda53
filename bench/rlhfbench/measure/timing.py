"""The timing measurement: steps without any instrument but a clock, until the stopping rule ends them."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rlhfbench.measure import ranks
from rlhfbench.measure.agreement import check_agreement
from rlhfbench.measure.announcer import Announcer, Notify
from rlhfbench.measure.clock import StepClock
from rlhfbench.measure.interference import Interference
from rlhfbench.measure.memory import outer_peaks
from rlhfbench.measure.step import Step
from rlhfbench.measure.stopping import Reason, StoppingRule
from rlhfbench.measure.turns import Turns
from rlhfkernels.config.case import Case
from rlhfkernels.errors import ModelError
from rlhfkernels.observer import Observer
from rlhfkernels.parallel.world import ALONE, World


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
    first = _warm_up(step, clock, case, rule, notify, world)
    notify("timing")
    steps_s: list[dict[str, float]] = []
    reason: Reason | None = None
    turns = None if turns_path is None or world.rank else Turns(turns_path)
    interference = Interference(case.device)
    with _named_failure(clock, notify), outer_peaks(case.device) as views:
        while reason is None:
            if turns_path is not None:
                interference.pause()
                # Without any turn, since the other side failed, one step makes the block whole.
                if not world.broadcast(turns is None or turns.wait()) and steps_s:
                    break
                interference.resume()
            world.barrier()
            step.run(clock).check_finite()
            steps_s.append(_phases_s(step, clock))
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


def _warm_up(
    step: Step, clock: StepClock, case: Case, rule: StoppingRule, notify: Notify, world: World
) -> dict[str, float | None]:
    """Runs steps until they are warm, and returns the statistics of the first one."""
    steps_s: list[float] = []
    first: dict[str, float | None] = {}
    observer: Observer = Announcer(notify, clock)
    while not world.broadcast(rule.is_warm(steps_s)):
        stats = step.run(observer)
        stats.check_finite()
        if not first:
            first = stats.to_dict()
            check_agreement(first, case.dtype, case.options.rollout.temperature)
        steps_s.append(sum(_phases_s(step, clock).values()))
        observer = clock
    return first


def _phases_s(step: Step, clock: StepClock) -> dict[str, float]:
    """Takes the seconds by phase of the step that ended.

    Raises:
        ModelError: It entered no phase.
    """
    phases_s = clock.take()
    if not phases_s:
        names = ", ".join(phase.name for phase in step.phases)
        raise ModelError(f"the step entered no phase: run(observer) must enter its phases: {names}.")
    return phases_s


@contextmanager
def _named_failure(clock: StepClock, notify: Notify) -> Iterator[None]:
    """Announces the phase in which a step failed: timed steps announce none while they run."""
    try:
        yield
    except BaseException:
        if clock.last_phase is not None:
            notify(f"phase:{clock.last_phase}")
        raise
