"""Models, methods as programs, one training step of each, and the ops under it.

Importing this package imports no torch. Names that need torch, such as ``build_step``, import it on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options
from rlhfkernels.errors import CaseError, DataError, ModelError, NumericalError, RlhfKernelsError
from rlhfkernels.methods.method import Method
from rlhfkernels.methods.phases import Phase
from rlhfkernels.methods.program import Role
from rlhfkernels.methods.table import METHODS
from rlhfkernels.models.presets import PRESETS, Preset

if TYPE_CHECKING:
    from rlhfkernels.data.batch import Batch
    from rlhfkernels.observer import Observer
    from rlhfkernels.training.roofline import Work
    from rlhfkernels.training.stats import StepStats
    from rlhfkernels.training.step import TrainingStep, build_step
    from rlhfkernels.training.work import phase_work

_LAZY = {
    "Batch": "rlhfkernels.data.batch",
    "Observer": "rlhfkernels.observer",
    "StepStats": "rlhfkernels.training.stats",
    "TrainingStep": "rlhfkernels.training.step",
    "Work": "rlhfkernels.training.roofline",
    "build_step": "rlhfkernels.training.step",
    "phase_work": "rlhfkernels.training.work",
}

__all__ = [
    "METHODS",
    "PRESETS",
    "Batch",
    "Case",
    "CaseError",
    "DataError",
    "Method",
    "ModelError",
    "NumericalError",
    "Observer",
    "Options",
    "Phase",
    "Preset",
    "RlhfKernelsError",
    "Role",
    "StepStats",
    "TrainingStep",
    "Work",
    "build_step",
    "phase_work",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
