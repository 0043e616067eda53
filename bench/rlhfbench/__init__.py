"""The harness: measures, predicts and reports what RLHF methods cost in memory and time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhfbench.cases.sweep import Sweep
    from rlhfbench.errors import ForkServerError, RecordsError, RlhfBenchError, RunFolderError, SweepError
    from rlhfbench.measure.ledger import Ledger
    from rlhfbench.planning.plans import plan
    from rlhfbench.records.file import read_records
    from rlhfbench.records.frame import records_frame
    from rlhfbench.runs.options import RunOptions
    from rlhfbench.runs.runner import run_sweep

    __version__: str

__all__ = [
    "ForkServerError",
    "Ledger",
    "RecordsError",
    "RlhfBenchError",
    "RunFolderError",
    "RunOptions",
    "Sweep",
    "SweepError",
    "__version__",
    "plan",
    "read_records",
    "records_frame",
    "run_sweep",
]

_MODULES = {
    "ForkServerError": "errors",
    "Ledger": "measure.ledger",
    "RecordsError": "errors",
    "RlhfBenchError": "errors",
    "RunFolderError": "errors",
    "RunOptions": "runs.options",
    "Sweep": "cases.sweep",
    "SweepError": "errors",
    "plan": "planning.plans",
    "read_records": "records.file",
    "records_frame": "records.frame",
    "run_sweep": "runs.runner",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: `import rlhfbench` is part of every `--help` and of every forked case.
    if name == "__version__":
        from importlib.metadata import version

        return version("rlhfbench")
    if name in _MODULES:
        return getattr(importlib.import_module(f"rlhfbench.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'rlhfbench' has no attribute {name!r}")
