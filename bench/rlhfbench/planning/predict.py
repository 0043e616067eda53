"""Predicted memory: the engine, run on fake tensors under the ledger, without a device and without weights.

No second formula for memory exists that could drift from the code. Most decode steps of a long completion are skipped:
they have no larger tensor than the first and the last. Most layers are skipped too: two shallow models show what one
layer more does, and that is repeated.
"""

from __future__ import annotations

from rlhfbench.measure.lifetimes import ReplayedTally
from rlhfbench.measure.memory import OUTER_VIEWS, memory_object
from rlhfbench.measure.tally import Tally, replay
from rlhfbench.measure.timeline import Timeline
from rlhfbench.planning.deep_recording import record_deep
from rlhfbench.planning.divisions import division_of
from rlhfbench.planning.prediction import Plan
from rlhfbench.planning.recording import record_step
from rlhfbench.planning.zero import Zero
from rlhfkernels.config.case import Case
from rlhfkernels.models.errors import running_errors
from rlhfkernels.observer import Observer
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
    of_found = (found.stretches, found.step, found.sizes, found.numels)
    tallies = {rank: Tally() for rank in zero.ranks(found.numels)}
    for rank, tally in tallies.items():
        replay(zero.changes(rank, *of_found), tally, Observer())
    worst = max(tallies, key=lambda rank: tallies[rank].peak.total_bytes)
    memory = memory_object(tallies[worst], dict(_NO_VIEWS))
    timeline = None
    if with_timeline:
        followed = Timeline()
        tally = ReplayedTally(followed.note, followed.note_lifetime)
        replay(zero.changes(worst, *of_found), tally, followed)
        tally.end()
        timeline = followed.to_dict(tally.peaks)
    work = phase_work(found.step, found.sizes, of_a_rank)
    return Plan(case=case, memory=memory, work=work, zero=zero, timeline=timeline)
