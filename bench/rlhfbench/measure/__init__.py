"""What is measured about one case: time, memory, the machine.

Importing this package imports no torch: the harness reads its options and samplers, the worker runs ``measure_case``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlhfbench.measure.options import MeasurementOptions
from rlhfkernels.config.case import Case

__all__ = ["MeasurementOptions", "measure_case"]


def measure_case(
    case: Case,
    options: MeasurementOptions,
    notify: Callable[[str], None],
    *,
    step_done: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Builds ``case``, runs its passes and returns what they found.

    Args:
        case: what is measured. Its device should be this process's alone.
        options: how.
        notify: told what is being done, as it begins: ``build``, ``warm-up``, ``timing``, ``memory``, ``profile``,
            ``ceilings``; and ``phase:<name>`` in a pass that no clock watches, and when a step fails.
        step_done: called before the ceilings, which are the device's and not the case's: they need room of their own.

    Returns:
        The ``memory``, ``latency``, ``work`` and ``prompts`` objects of the record, and ``ceilings``, for the options
        of the run's next case on the same device in the same dtype; and ``timeline``, ``None`` unless it is asked for.

    Raises:
        RlhfKernelsError: the model or the prompts cannot be used, or a step's numbers are not finite.
    """
    from rlhfbench.measure.measurements import run_measurements

    return run_measurements(case, options, notify, step_done)
