"""What is measured: the models, the methods as role tables, one training step of each, and the ops under it.

Importing this package imports no torch; ``build_step`` and its kin do when they are first touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options
from rlhfkernels.errors import CaseError, ModelError, NumericalError, PromptsError, RlhfKernelsError
from rlhfkernels.methods.table import METHODS, Method, Pass, Phase, Role
from rlhfkernels.models.presets import PRESETS, Preset

if TYPE_CHECKING:
    from rlhfkernels.data.rollout import Rollout
    from rlhfkernels.observer import Observer
    from rlhfkernels.training.step import PPOStep, StepStats, build_step
    from rlhfkernels.training.work import Work, phase_work

_LAZY = {
    "Observer": "rlhfkernels.observer",
    "PPOStep": "rlhfkernels.training.step",
    "Rollout": "rlhfkernels.data.rollout",
    "StepStats": "rlhfkernels.training.step",
    "Work": "rlhfkernels.training.work",
    "build_step": "rlhfkernels.training.step",
    "phase_work": "rlhfkernels.training.work",
}

__all__ = [
    "METHODS",
    "PRESETS",
    "Case",
    "CaseError",
    "Method",
    "ModelError",
    "NumericalError",
    "Observer",
    "Options",
    "PPOStep",
    "Pass",
    "Phase",
    "Preset",
    "PromptsError",
    "RlhfKernelsError",
    "Role",
    "Rollout",
    "StepStats",
    "Work",
    "build_step",
    "phase_work",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
