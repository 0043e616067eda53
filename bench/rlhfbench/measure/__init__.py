"""Measurements of one case: time, memory, and the device's ceilings.

Importing this package does not import torch: the harness needs only the options and the samplers. The worker process
calls ``measure_case``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlhfbench.measure.options import MeasurementOptions
from rlhfkernels.config.case import Case

if TYPE_CHECKING:
    from rlhfkernels.parallel.world import World

__all__ = ["MeasurementOptions", "measure_case"]


def measure_case(
    case: Case,
    options: MeasurementOptions,
    notify: Callable[[str], None],
    *,
    step_begins: Callable[[], object] = lambda: None,
    world: World | None = None,
    enter_phase: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Builds the step of ``case``, measures it and returns the results.

    Args:
        case: The case to measure. No other process should use its device.
        options: How to measure it.
        notify: Called at the beginning of each stage with its name: ``ceilings``, ``build``, ``warm-up``, ``timing``,
            ``memory``, ``profile``. Called with ``phase:<name>`` at each phase of a step that is not timed, and when a
            timed step fails.
        step_begins: Called before the step is built and after the ceilings are measured. A memory limit of the case
            can begin here: the ceilings need buffers of their own.
        world: The ranks that share the case, of which this process is one. All of them call this function.
        enter_phase: Called with the name of each phase of a timed step, inside its time: it must cost next to nothing.

    Returns:
        ``block``: seconds by phase of each timed step, why timing stopped, interference, ceilings and floors. Of block
        0 also the ``memory``, ``work``, ``stats``, ``prompts``, ``engine``, ``kernels`` and ``num_threads`` entries of
        the record, ``latency`` with the kinds of the phases and the number of blocks, and ``timeline``, ``None``
        unless requested. Of several ranks, rank 0 returns what all of them measured, with ``world``.

    Raises:
        RlhfKernelsError: The model or the prompts cannot be used, or a loss, gradient norm or KL is not finite.
    """
    from rlhfbench.measure.measurements import run_measurements

    return run_measurements(case, options, notify, step_begins, world, enter_phase)
