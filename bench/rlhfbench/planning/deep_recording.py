"""Recordings of deep models, extrapolated from two shallow ones of the same model."""

from __future__ import annotations

import dataclasses

from rlhfbench.measure.ledger import block_bytes
from rlhfbench.measure.tally import Change, unnamed
from rlhfbench.planning.depth import deepen
from rlhfbench.planning.divisions import division_of
from rlhfbench.planning.optimizer_steps import deepen_trained, record_optimizer_steps
from rlhfbench.planning.recording import Recording, record_step
from rlhfbench.planning.zero import Zero
from rlhfkernels.config.case import Case
from rlhfkernels.models.depth import Layers, alike_layers

# Periods of the shallower step: the first layer and the last, then one more, which is next to both.
_PERIODS = (2, 3)
# The shallow steps must be cheaper than the deep one, by enough to risk that they do not fit together.
_MOST_SHARE = 0.75


def record_deep(case: Case, division: Zero | None = None) -> Recording | None:
    """Records a step of ``case`` from two steps with fewer layers, to the byte as if every layer had run.

    Args:
        case: as in ``record_step``.
        division: as in ``record_step``.

    Returns:
        ``None`` where that cannot be known: the layers of a model differ, two models have depths of their own, what a
        rank gathers or reduces does not grow layer by layer, the model is shallow, or one layer more is not what
        repeating a layer gives.

    Raises:
        ModelError, CaseError: as in ``record_step``.
    """
    division = division or division_of(case)
    if len(case.models) > 1 or not division.repeats_layers(case):
        return None
    layers = alike_layers(case, case.model)
    if layers is None:
        return None
    for shallow, deeper in _depths(layers):
        times = (layers.count - deeper) // layers.period
        found = _deepen(record_step(case, shallow, division), record_step(case, deeper, division), times, case)
        if found is not None:
            return found if division.repeats_layers(case, found.sizes) else None
    return None


def _depths(layers: Layers) -> list[tuple[int, int]]:
    """The pairs of depths to try. They end at the same place of a period as the whole model."""
    found = []
    num_layers = 0
    for periods in _PERIODS:
        shallow = periods * layers.period + layers.count % layers.period
        deeper = shallow + 2 * layers.period
        num_layers += shallow + deeper
        if num_layers <= _MOST_SHARE * layers.count:
            found.append((shallow, deeper))
    return found


def _deepen(shallow: Recording, deeper: Recording, times: int, case: Case) -> Recording | None:
    """The recording ``times`` periods beyond ``deeper``; ``None`` if the two do not show what a period adds."""
    if len(shallow.stretches) != len(deeper.stretches) or shallow.trained.keys() != deeper.trained.keys():
        return None
    stretches = []
    for index, (fewer, more) in enumerate(zip(shallow.stretches, deeper.stretches, strict=True)):
        if index in deeper.trained:
            stretch = _optimizer_stretch(shallow, deeper, index, times, case)
        else:
            stretch = deepen(fewer, more, times)
        if stretch is None:
            return None
        stretches.append(stretch)
    numels = {}
    for role, fewer_numels in shallow.numels.items():
        deep = deepen(fewer_numels, deeper.numels[role], times)
        if deep is None:
            return None
        numels[role] = tuple(deep)
    sizes = shallow.sizes.deepened(deeper.sizes, times)
    return dataclasses.replace(deeper, stretches=stretches, trained={}, sizes=sizes, numels=numels)


def _optimizer_stretch(
    shallow: Recording, deeper: Recording, index: int, times: int, case: Case
) -> list[Change] | None:
    """The stretch of optimizer steps at the whole depth; ``None`` if such steps alone are not what ``deeper`` has."""
    trained = deepen_trained(shallow.trained[index], deeper.trained[index], times)
    if trained is None:
        return None
    boundary, *changes = deeper.stretches[index]
    options, block = case.options.optimizer, block_bytes(case.device)
    # Recorded apart, the gradients have no op that made them.
    if unnamed(record_optimizer_steps(options, deeper.trained[index], block)) != unnamed(changes):
        return None
    return [boundary, *record_optimizer_steps(options, trained, block)]
