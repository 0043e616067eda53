"""Predicted memory: the engine, run on fake tensors under the ledger, without a device and without weights.

No second formula for memory exists that could drift from the code. Most decode steps of a long completion are skipped:
they have no larger tensor than the first and the last. Most layers are skipped too: two shallow models show what one
layer more does, and that is repeated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from rlhfbench.measure.lifetimes import ReplayedTally
from rlhfbench.measure.memory import OUTER_VIEWS, memory_object, persistent_model_bytes
from rlhfbench.measure.tally import MODEL_PARTS, Tally, replay
from rlhfbench.measure.timeline import Timeline
from rlhfbench.planning.deep_recording import record_deep
from rlhfbench.planning.divisions import division_of
from rlhfbench.planning.prediction import Plan
from rlhfbench.planning.recording import record_step
from rlhfbench.planning.zero import Zero
from rlhfbench.records.timelines import divided_timeline
from rlhfkernels.config.case import Case
from rlhfkernels.models.faults import running_errors
from rlhfkernels.observer import PARTS, Observer
from rlhfkernels.training.work import phase_work

_NO_VIEWS = dict.fromkeys(OUTER_VIEWS)


def plan_case(case: Case, zero: Zero | None = None, *, with_timeline: bool = False, every_layer: bool = False) -> Plan:
    """Predicts one step of ``case``; see ``record_step`` for what stands in for what.

    Args:
        case: what to plan.
        zero: how the step is divided among ranks; ``None`` is what the options of the case name.
        with_timeline: keep the step's timeline too.
        every_layer: run every layer of the models, also where a few of them stand for all.

    Raises:
        ModelError: the model's configuration cannot be read, describes no model that runs, or it is too short.
        CaseError: an option does not fit the model.
    """
    with running_errors(case.models):
        return _plan_case(case, zero or division_of(case), with_timeline=with_timeline, every_layer=every_layer)


def _plan_case(case: Case, zero: Zero, *, with_timeline: bool, every_layer: bool) -> Plan:
    of_a_rank = zero.of_a_rank(case)
    found = (None if every_layer else record_deep(of_a_rank, zero)) or record_step(of_a_rank, division=zero)
    timeline = Timeline() if with_timeline else None
    tally = Tally() if timeline is None else ReplayedTally(timeline.note, timeline.note_lifetime)
    changes = zero.changes(found.stretches, found.step, found.sizes, found.numels)
    replay(changes, tally, Observer() if timeline is None else timeline)
    if isinstance(tally, ReplayedTally):
        tally.end()
    divide = functools.partial(zero.divide, sizes=found.sizes)
    buckets = zero.buckets(found.step, found.sizes, found.numels)
    memory = divided(memory_object(tally, dict(_NO_VIEWS)), divide, buckets)
    kept = None if timeline is None else divided_timeline(timeline.to_dict(tally.peaks), divide)
    return Plan(case=case, memory=memory, work=phase_work(found.step, found.sizes), zero=zero, timeline=kept)


def divided(
    memory: dict[str, Any], divide: Callable[[dict[str, int]], dict[str, int]], buckets: dict[str, int]
) -> dict[str, Any]:
    """``memory`` on one rank.

    Args:
        memory: of one process.
        divide: the parts of a rank.
        buckets: further bytes of the part by phase.
    """
    phases = {name: divide(phase["parts"]) for name, phase in memory["phases"].items()}
    for name, parts in phases.items():
        parts["buckets"] += buckets[name]
    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    peak_phase = max(totals, key=lambda name: totals[name])
    parts, total = phases[peak_phase], totals[peak_phase]
    assert set(parts) == set(PARTS)
    model = sum(parts[part] for part in MODEL_PARTS)
    return {
        **memory,
        "model_bytes": model,
        "activation_bytes": total - model - parts["rollout"],
        "rollout_bytes": parts["rollout"],
        "total_bytes": total,
        "persistent_model_bytes": persistent_model_bytes(phases.values()),
        "peak_phase": peak_phase,
        "parts": parts,
        "phases": {name: {"total_bytes": totals[name], "parts": phases[name]} for name in phases},
        "views": {**memory["views"], "ledger_peak_bytes": total},
    }
