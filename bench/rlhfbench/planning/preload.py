"""Imports what plans need, in two thirds of the time, for the process that planning processes are forked from.

CPU time on 2 cores: 3.6 s as Python does it, 2.7 s without the garbage collector, which goes over all modules again and
again and frees next to nothing, 2.3 s without ``scipy.optimize`` too, which transformers imports for the losses of
object detection.
"""

from __future__ import annotations

import atexit
import gc
import importlib
from contextlib import suppress
from unittest import mock


def _import_planner() -> None:
    utils = importlib.import_module("transformers.utils")  # here, where no collection runs
    with mock.patch.object(utils, "is_scipy_available", return_value=False):
        importlib.import_module("rlhfbench.planning.predict")
    with suppress(ImportError):  # not in every version of transformers and PEFT
        importlib.import_module("rlhfkernels.models.warm")


gc.disable()
try:
    _import_planner()
finally:
    gc.enable()
atexit.register(gc.unfreeze)  # Triton's bindings print what lives at the end as leaked
gc.freeze()  # a collection in a forked process would copy the pages of these modules
