"""What is measured: the models, the methods as role tables, one training step of each, and the ops under it.

Importing this package imports no torch; ``build_step`` and its kin do when they are first touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlhfkernels.case import Case, Options
from rlhfkernels.errors import CaseError, ModelError, NumericalError, PromptsError, RlhfKernelsError
from rlhfkernels.methods import METHODS, Method, Pass, Phase, Role
from rlhfkernels.presets import PRESETS, Preset

if TYPE_CHECKING:
    from rlhfkernels.observer import Observer
    from rlhfkernels.rollout import Rollout
    from rlhfkernels.step import PPOStep, StepStats, build_step
    from rlhfkernels.work import Work, phase_work

_LAZY = {
    "Observer": "rlhfkernels.observer",
    "PPOStep": "rlhfkernels.step",
    "Rollout": "rlhfkernels.rollout",
    "StepStats": "rlhfkernels.step",
    "Work": "rlhfkernels.work",
    "build_step": "rlhfkernels.step",
    "phase_work": "rlhfkernels.work",
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
